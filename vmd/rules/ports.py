"""Access to ports of guests, and to debugging."""

from vmd.rules.actions import Action, Answer, OpenDebugger, OpenPort
from vmd.rules.encryption import why_denied
from vmd.rules.vm import Vm
from vmd.rules.vm_state import Phase, Ticket
from vmd.wire.messages import ErrorCode, Failed
from vmd.wire.ports import Connect, Debug


def open_stream(ticket: Ticket, vm: Vm, request: Connect | Debug) -> Action:
    """Return the actions for a client that may reach the guest.

    A guest that is paused, or boots, accepts later or not at all, as over a network.
    """
    if isinstance(request, Connect) and not vm.config.has_vsock:
        return _refuse(ticket, ErrorCode.EINVAL, "the VM has no vsock device")
    sealed = why_denied(vm.config, "debugged") if isinstance(request, Debug) else None
    if sealed:
        return _refuse(ticket, sealed.code, sealed.message)
    if vm.state.pid is None:
        return _refuse(ticket, ErrorCode.NOT_RUNNING)
    if vm.state.phase is Phase.SENDING:
        return _refuse(ticket, ErrorCode.EBUSY, "the VM is being sent")
    if isinstance(request, Debug):
        return OpenDebugger(ticket, vm)
    return OpenPort(ticket, vm, request.port)


def _refuse(ticket: Ticket, code: ErrorCode, message: str = "") -> Action:
    return Answer(ticket.client, Failed(serial=ticket.serial, code=code, message=message))
