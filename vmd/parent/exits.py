"""The meaning of a VM process's end for its VM."""

from vmd.rules import vm_state
from vmd.wire.internal import VmExited


def exit_event(exited: VmExited) -> vm_state.Exited:
    """Return the lifecycle's event: the process's last word, or how it ended without one."""
    ending = exited.ending
    if ending is not None:
        return vm_state.Exited(ending.reason, ending.code, ending.message, exited.status)
    if exited.status < 0:
        how = f"was killed by signal {-exited.status}"
    else:
        how = f"exited with status {exited.status}"
    return vm_state.Exited(None, message=f"the VM process {how}", status=exited.status)
