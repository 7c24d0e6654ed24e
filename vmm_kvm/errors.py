"""The exceptions of this package, sorted by the caller's reaction.

VmmError
├── KvmError          a KVM operation failed (also an OSError): the host's fault
├── RefusedError      one of vmm(4)'s operations does not accept its arguments, or not now
├── SpecError         the caller asked for a machine that cannot be built
├── BusError          two devices claim one address: wiring is wrong
├── BootError         the boot image cannot be loaded: the image's fault
├── ImageError        a disk image cannot be opened, or is corrupt: the image's fault
├── StateError        a saved state is not one of this machine: its author's fault
├── SnapshotError     a snapshot is damaged, or of a machine that cannot continue here
├── HaltError         a device cannot continue until the host can: the VM has to be paused
├── VhostUserError    the peer broke the vhost-user protocol (in `virtio.vhost_user.messages`)
└── GuestError        the guest did something invalid: its device goes into an error state
    ├── GuestMemoryError   an access outside guest RAM
    └── VirtqueueError     a malformed virtqueue, descriptor chain or request
"""

import enum
import os
from errno import EDQUOT, ENOSPC


class VmmError(Exception):
    """Anything that this package raises on purpose."""


class KvmError(VmmError, OSError):
    """A KVM operation failed.

    `str()` is one line that says what and why: `KVM_CREATE_VM: Device or resource busy`.
    """

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        """Remember `operation` (the name of an ioctl or system call), errno, and advice."""
        OSError.__init__(self, errno, os.strerror(errno))
        self.operation = operation
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.operation}: {self.strerror}"
        return f"{text} ({self.hint})" if self.hint else text


class Refusal(enum.Enum):
    """Why an operation of vmm(4) is refused; the names are OpenBSD's."""

    EINVAL = "an argument is out of range"
    ENOENT = "no such VM or vCPU"
    EBUSY = "the vCPU is not stopped"
    ENOMEM = "the host has no room for it"
    EPERM = "another process owns it"
    EIO = "the processor does not take the state"


class RefusedError(VmmError):
    """An operation of vmm(4) is refused; nothing has changed."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        """Remember why, for the caller, and `message`, for the user."""
        super().__init__(message)
        self.refusal = refusal


class SpecError(VmmError):
    """A machine specification is out of range or contradicts itself."""


class BusError(VmmError):
    """A range on a bus is empty, out of bounds or already claimed."""


class BootError(VmmError):
    """A boot image is missing, truncated, oversized, of another architecture, or garbage."""


class ImageError(VmmError):
    """A disk image is missing, in use, corrupt, or of a kind that is not supported."""


class StateError(VmmError):
    """A saved state is of another machine, of another version, or garbage; one line says why."""


class SnapshotError(VmmError):
    """A snapshot or its stream is damaged, incomplete, or of a machine that cannot run here."""


class HaltReason(enum.StrEnum):
    """The reason for which a device cannot continue."""

    NO_SPACE = "no space"
    IO_ERROR = "I/O error"
    IN_DOUBT = "in doubt"
    """No fault of a device: the VM was handed over, and may run elsewhere."""


class HaltError(VmmError):
    """The host cannot do what a request needs; the request waits in its queue.

    The VM must pause; when it is unpaused, the request is tried again.
    """

    def __init__(self, name: str, errno: int) -> None:
        """Remember the name of the device, for messages, and the host's fault."""
        super().__init__(f"{name}: {os.strerror(errno)}")
        self.errno = errno

    @property
    def reason(self) -> HaltReason:
        """Faults that need a person to act."""
        is_full = self.errno in {ENOSPC, EDQUOT}
        return HaltReason.NO_SPACE if is_full else HaltReason.IO_ERROR


class GuestError(VmmError):
    """The guest did something invalid; its device stops, the host continues."""


class GuestMemoryError(GuestError):
    """The guest named memory that it does not have."""

    def __init__(self, gpa: int, size: int) -> None:
        """Remember the access: `gpa` is a guest-physical address, `size` is in bytes."""
        super().__init__(f"guest memory {gpa:#x}+{size:#x}: outside RAM")
        self.gpa = gpa
        self.size = size


class VirtqueueError(GuestError):
    """The guest built a virtqueue, a descriptor chain or a request that cannot be."""
