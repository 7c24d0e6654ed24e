"""Unpacked Linux kernels, kept by the parent and lent to VM processes, which have no files.

A VM process that finds no kernel unpacks its boot image and hands the result over, in sealed
memory. The parent keeps it for later starts of the same file, under the state in which the parent
itself saw the file. Only the file may decide the kernel, so the parent accepts one only from a
process whose guest does not run yet.

Source: memfd_create(2), fcntl(2) "File Sealing".
"""

import fcntl
import os
from collections.abc import Callable, Sequence

from vmm_kvm.boot.source import FileSource, Stamp
from vmm_kvm.log import Log
from vmm_kvm.memfd import ALL_SEALS, make_constant

log = Log(__name__)

KERNELS_MAX = 4
"""Kernels that are kept; one takes 30 to 60 MiB. The least recently used go first."""
KERNEL_SIZE_MAX = 256 << 20


class KernelStore:
    """The kernels that the parent keeps; owns their descriptors."""

    def __init__(self) -> None:
        """Begin with none."""
        self._kernels: dict[Stamp, int] = {}  # in the order of their last use
        self._expected: dict[int, Stamp] = {}  # boot images of VMs whose guests do not run yet

    def find(self, stamp: Stamp) -> int | None:
        """Return the unpacked kernel of a boot image in this state, if it is known.

        The descriptor returned is the caller's, and newly opened for reading, with a file offset of
        its own.
        """
        kernel = self._kernels.pop(stamp, None)
        if kernel is None:
            return None
        self._kernels[stamp] = kernel
        return os.open(f"/proc/self/fd/{kernel}", os.O_RDONLY | os.O_CLOEXEC)

    def expect(self, vm_id: int, stamp: Stamp) -> None:
        """Expect the unpacked kernel of a file in this state from a VM's process, once.

        Not if a change of the file might not show in its state: then `stamp` is empty.
        """
        if stamp:
            self._expected[vm_id] = stamp

    def expect_no_more(self, vm_id: int) -> None:
        """Accept no more from a VM's process: its guest runs, and may have taken it over."""
        self._expected.pop(vm_id, None)

    def keep(self, vm_id: int, kernel: int) -> bool:
        """Keep the kernel that a VM's process has unpacked; takes ownership of `kernel`.

        Returns whether it is kept: it must be expected, and sealed.
        """
        stamp = self._expected.pop(vm_id, None)
        if stamp is None or stamp in self._kernels or not _is_sealed(kernel):
            os.close(kernel)
            return False
        self._kernels[stamp] = kernel
        if len(self._kernels) > KERNELS_MAX:
            os.close(self._kernels.pop(next(iter(self._kernels))))
        return True

    def close(self) -> None:
        """Forget all kernels."""
        for kernel in self._kernels.values():
            os.close(kernel)
        self._kernels.clear()


def _is_sealed(kernel: int) -> bool:
    try:
        is_sealed = fcntl.fcntl(kernel, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
    except OSError:  # it is no such memory
        return False
    return is_sealed and 0 < os.fstat(kernel).st_size <= KERNEL_SIZE_MAX


class LentKernel:
    """A VM process's access to the store: the kernel lent to it, and a way to hand one over."""

    def __init__(self, kernel: FileSource | None, hand_over: Callable[[int], None]) -> None:
        """Use `kernel`, if there is one; `hand_over` takes ownership of a descriptor."""
        self._kernel = kernel
        self._hand_over = hand_over

    def find(self, image: FileSource) -> FileSource | None:
        """Return the unpacked kernel, if one was lent."""
        if self._kernel:
            self._kernel.name = image.name  # for errors
        return self._kernel

    def find_digest(self, _image: FileSource, _digest: str) -> FileSource | None:
        """Return None: kernels are not known by their contents."""
        return None

    def keep(self, image: FileSource, _digest: str, kernel: Sequence[bytes | memoryview]) -> None:
        """Hand over what `image` unpacks to."""
        try:
            fd = make_constant("kernel", kernel)
        except OSError as err:  # a start needs no store
            log.debug("%s: not kept: %s", image.name, err.strerror)
        else:
            self._hand_over(fd)
