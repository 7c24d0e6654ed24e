"""The parent's part of AMD SEV: it opens /dev/sev, and sees whether firmware is behind it.

A VM process gets a descriptor for reading alone: with it, KVM passes the commands of one VM's
launch on, but nobody can reset the firmware, or make keys and certificates. The kernel checks the
rest.

Source: OpenBSD vmd/psp.c; Linux drivers/crypto/ccp/sev-dev.c, sev_ioctl.
"""

import os
import resource
from contextlib import suppress

from vmd.parent.errors import ResourceError
from vmd.rules.encryption import why_not_started
from vmd.rules.vm import Vm
from vmd.wire.messages import ErrorCode
from vmm_kvm.errors import KvmError
from vmm_kvm.log import Log

log = Log(__name__)

_DEVICE = "/dev/sev"


def open_sev(vm: Vm, path: str = _DEVICE) -> int:
    """Return /dev/sev, open for a VM with encrypted memory; the descriptor is the caller's.

    Raises:
        ResourceError: the VM cannot have that, or the host has no such firmware.
    """
    passed = vm.files
    problem = why_not_started(
        vm.config,
        is_template=vm.state.is_template,
        continues=vm.origin is not None or (passed is not None and passed.stream is not None),
        has_image=passed is not None and passed.kernel is not None,
    )
    if problem:
        raise ResourceError(ErrorCode.EINVAL, f"its memory is to be encrypted: {problem}")
    from vmm_kvm.kvm.sev import platform  # noqa: PLC0415 - few VMs have it

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as err:
        raise ResourceError(ErrorCode.EINVAL, f"{path} not available") from err
    try:
        platform(fd)
    except KvmError as err:
        os.close(fd)
        raise ResourceError(ErrorCode.EINVAL, f"{path} not available: {err}") from err
    return fd


def lift_limit() -> None:
    """Let this process's children lock any amount of memory, if a VM's can be encrypted.

    The kernel counts encrypted memory, which has to stay in its place, as locked. No filter of
    theirs lets them lock memory by other means. As root alone; else the limit stays.
    """
    if os.path.exists(_DEVICE):  # noqa: PTH110 - the plainest way
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)


def announce(path: str = _DEVICE) -> None:
    """Log the version of the firmware, if there is any; that there is none is no error."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as err:
        log.debug("failed to open %s: %s", path, err.strerror)
        return
    from vmm_kvm.kvm.sev import platform  # noqa: PLC0415 - few hosts have it

    try:
        found = platform(fd)
        log.info("PSP api %d.%d, build %d", found.major, found.minor, found.build)
    except KvmError as err:
        log.warning("failed to get platform state: %s", err)
    finally:
        os.close(fd)
