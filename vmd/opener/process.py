"""Receive one list of files, open them with the rights of a client, and answer.

However slow the file system of a client's file is, only this process waits for it; the parent kills
it when its time is over. It parses the headers of images for their bases, which may name any file:
it opens none that the client could not open.
"""

import os

from vmd.shared.opening import Files, OpeningError
from vmd.wire.ancillary import FDS_MAX
from vmd.wire.channel import Channel, ChannelError, Fds
from vmd.wire.files import FilesOpened, OpenerToParent, OpenFiles, OpeningFailed
from vmd.wire.messages import ErrorCode
from vmd.wire.parcels import unwrap, wrap
from vmm_kvm.log import Log

log = Log(__name__)

LOCK_PATIENCE_S = 1.0
"""How long a lock may be another's: a file that a VM has just given up is closed soon."""


def serve(parent: Channel[OpenerToParent, OpenFiles]) -> None:
    """Answer the one request that comes from `parent`."""
    failure: OpeningError | None = None
    try:
        received = parent.wait()
        with received.fds as passed, Files() as files:
            try:
                _open(parent, received.message, passed, files)
            except OpeningError as err:
                failure = err
            except OSError as err:
                failure = OpeningError(ErrorCode.EAGAIN, err.strerror or str(err))
        if failure:  # everything is closed and unlocked by now: the next start may come at once
            parent.send(OpeningFailed(code=failure.code, message=str(failure)))
    except ChannelError as err:
        log.debug("parent: %s", err)


def _open(
    parent: Channel[OpenerToParent, OpenFiles], request: OpenFiles, passed: Fds, files: Files
) -> None:
    """Open files, and send them: those of a parcel in the same one, the others in new ones."""
    parcels: dict[int, int] = {}
    with Fds() as found:
        for fd in passed.left:
            parcels[found.add(unwrap(fd) or os.dup(fd))] = fd
        files.open(request.files, found, lock_patience_s=LOCK_PATIENCE_S)
    with Fds() as sent, Fds() as keepers:
        made = []
        for place, fd in enumerate(files.fds):
            if fd in parcels:
                sent.add(os.dup(parcels[fd]))
                continue
            parcel, keeper = wrap(fd)
            sent.add(parcel)
            keepers.add(keeper)
            made.append(place)
        if len(sent) + len(keepers) > FDS_MAX:
            made.clear()
            keepers.close()
        answer = FilesOpened(files=tuple(files.found), kept=tuple(made))
        parent.send(answer, [*sent.take_all(), *keepers.take_all()])
