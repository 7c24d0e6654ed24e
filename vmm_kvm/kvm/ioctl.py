"""System calls that Python lacks: ioctl(2) for KVM with its request numbers, and tgkill.

A failed call's errno becomes KvmError. Every ioctl of KVM goes through here, and only
`enter_fast` through `fcntl.ioctl`: from Python 3.14 on that repeats a call which a signal has
interrupted, so that a kicked vCPU never comes out, and on 3.11 it refuses by-value arguments above
INT_MAX, such as the address of KVM_SET_TSS_ADDR. Requests of other devices, which no signal
interrupts, use it.
"""

import ctypes
import fcntl
import os
import sys
from collections.abc import Callable
from errno import EINTR, ESRCH
from typing import Protocol, cast

from vmm_kvm.errors import KvmError
from vmm_kvm.libc import LIBC, LIBC_WITHOUT_ERRNO

_IOC_NRSHIFT = 0
_IOC_TYPESHIFT = 8
_IOC_SIZESHIFT = 16
_IOC_DIRSHIFT = 30
_IOC_NONE = 0
_IOC_WRITE = 1
_IOC_READ = 2

type_of_data = type[ctypes.Structure] | type[ctypes.c_uint64]

_ioctl = LIBC.ioctl
_SYS_TGKILL = 234

OPERATIONS: dict[int, str] = {}
"""The C name of each request, for error messages; the table of requests fills it in."""


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return (
        direction << _IOC_DIRSHIFT
        | size << _IOC_SIZESHIFT
        | kind << _IOC_TYPESHIFT
        | number << _IOC_NRSHIFT
    )


def _IO(kind: int, number: int) -> int:  # noqa: N802 - the C macro's name
    """Return the request whose argument, if any, is a plain number."""
    return _ioc(_IOC_NONE, kind, number, 0)


def _IOR(kind: int, number: int, data: type_of_data) -> int:  # noqa: N802 - same
    """Return the request that reads `data` from the kernel."""
    return _ioc(_IOC_READ, kind, number, ctypes.sizeof(data))


def _IOW(kind: int, number: int, data: type_of_data) -> int:  # noqa: N802 - same
    """Return the request that hands `data` to the kernel."""
    return _ioc(_IOC_WRITE, kind, number, ctypes.sizeof(data))


def _IOWR(kind: int, number: int, data: type_of_data) -> int:  # noqa: N802 - same
    """Return the request that hands `data` to the kernel and gets it back changed."""
    return _ioc(_IOC_READ | _IOC_WRITE, kind, number, ctypes.sizeof(data))


def operation(request: int) -> str:
    """Return the C name of `request`, or its number when it has none here."""
    return OPERATIONS.get(request, f"ioctl {request:#x}")


def ioctl(fd: int, request: int, argument: int | ctypes.Structure | ctypes.c_uint64 = 0) -> int:
    """Perform `request` on `fd` and return the kernel's result, 0 or more.

    `argument` is passed by value if it is an int, else by reference; the kernel may change it.
    EINTR is an error like any other here.

    Raises:
        KvmError: the kernel refused; `errno` says why.
    """
    passed = argument if isinstance(argument, int) else ctypes.byref(argument)
    result: int = _ioctl(fd, request, passed)
    if result < 0:
        raise KvmError(operation(request), ctypes.get_errno())
    return result


def exchange(fd: int, request: int, buffer: "ctypes.Array[ctypes.c_char]") -> int:
    """Perform `request` on `buffer`, which the kernel may change; return its result.

    Raises:
        KvmError: the kernel refused.
    """
    result: int = _ioctl(fd, request, buffer)
    if result < 0:
        raise KvmError(operation(request), ctypes.get_errno())
    return result


def get_bytes(fd: int, request: int, size: int, head: bytes = b"") -> bytes:
    """Perform `request` on a buffer of `size` bytes that begins with `head`; return the buffer.

    For states kept as the kernel's own structures, whose fields are not read.

    Raises:
        KvmError: the kernel refused.
    """
    buffer = (ctypes.c_char * size).from_buffer_copy(head.ljust(size, b"\0"))
    exchange(fd, request, buffer)
    return buffer.raw


def set_bytes(fd: int, request: int, data: bytes) -> int:
    """Perform `request` with the structure `data`, which the kernel may not change; its result.

    Raises:
        KvmError: the kernel refused.
    """
    result: int = _ioctl(fd, request, data)
    if result < 0:
        raise KvmError(operation(request), ctypes.get_errno())
    return result


def retried_ioctl(fd: int, request: int, argument: int = 0) -> int:
    """Perform `request` like `ioctl`, again as long as a signal interrupts it.

    Raises:
        KvmError: the kernel refused for another reason than EINTR.
    """
    while True:
        try:
            return ioctl(fd, request, argument)
        except KvmError as err:
            if err.errno != EINTR:
                raise


enter: Callable[[int, int, int], int] = LIBC["ioctl"]
"""`enter(fd, request, 0)`: ioctl(2) for KVM_RUN, whose result the caller checks.

Returns less than 0 if it failed, also when a signal ended it; `ctypes.get_errno()` says why. No
argument types are set: all three are passed as C ints, which they fit, and declared types would
be looked up for each.
"""


class _Enter(Protocol):
    def __call__(self, *arguments: int) -> int: ...


# `enter_fast(*entry(fd, request))` is KVM_RUN in the quickest way that this Python has. It fails by
# an OSError, by ValueError for a closed descriptor, or returns less than 0; a caller that sees a
# failure calls `enter` to learn why. `bench/exits` measures what it costs.
if sys.version_info >= (3, 14):  # fcntl.ioctl does not let a kicked vCPU out
    enter_fast: _Enter = LIBC_WITHOUT_ERRNO["ioctl"]

    def entry(fd: int, request: int) -> tuple[int, ...]:
        """Return the arguments of `enter_fast`."""
        return fd, request, 0

else:
    enter_fast: _Enter = cast(_Enter, fcntl.ioctl)

    def entry(fd: int, request: int) -> tuple[int, ...]:
        """Return the arguments of `enter_fast`."""
        return fd, request  # a third one is parsed three times before it is found to be a number


def signal_thread(native_id: int, signal: int) -> None:
    """Send `signal` to the thread `native_id` of this process; nothing happens if it has ended.

    Unlike pthread_kill(3), which is undefined for a thread that has ended.

    Raises:
        KvmError: the signal number is invalid.

    Source: tgkill(2).
    """
    if LIBC.syscall(_SYS_TGKILL, os.getpid(), native_id, signal) < 0:
        errno = ctypes.get_errno()
        if errno != ESRCH:
            raise KvmError("tgkill", errno)
