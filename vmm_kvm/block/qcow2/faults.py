"""The reaction to an image that turns out to be corrupt while it is in use."""

import errno

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.qcow2.header import INCOMPATIBLE_OFFSET, Header, Incompatible
from vmm_kvm.log import Log

log = Log(__name__)


class Faults:
    """Marks an image as corrupt, once, and makes the fault that its user sees."""

    __slots__ = ("_file", "_header", "is_corrupt")

    def __init__(self, file: HostFile, header: Header) -> None:
        """Watch over the image in `file`."""
        self._file = file
        self._header = header
        self.is_corrupt = False

    def corrupt(self, what: str) -> OSError:
        """Mark the image so that it is not written any more, and return the fault to raise.

        Source: qcow2 specification, "incompatible_features", bit 1.
        """
        if not self.is_corrupt:
            self.is_corrupt = True
            log.warning("%s: corrupt: %s", self._file.name, what)
            if not self._file.is_read_only and self._header.version >= 3:
                features = self._header.incompatible | Incompatible.CORRUPT
                try:
                    self._file.write(INCOMPATIBLE_OFFSET, features.to_bytes(8, "big"))
                except OSError as err:
                    log.warning("%s: not marked as corrupt: %s", self._file.name, err.strerror)
        return LastingError(errno.EIO, f"corrupt: {what}")
