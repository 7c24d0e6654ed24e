"""Answers to requests of a VM's life, as effects of a step."""

from vmd.rules.vm_state import Effect, Reply, Ticket, VmState
from vmd.wire.messages import Done, ErrorCode, Failed, Terminated

NOT_RUNNING = "the VM is not running"


def terminated(vm: VmState, ticket: Ticket) -> Effect:
    """Say that it has ended."""
    return Reply(ticket, Terminated(serial=ticket.serial, id=vm.id))


def done(vm: VmState, ticket: Ticket) -> Effect:
    """Say that it is done."""
    return Reply(ticket, Done(serial=ticket.serial, id=vm.id))


def failed(ticket: Ticket | None, code: ErrorCode, message: str) -> tuple[Effect, ...]:
    """Say why it is not done, if anybody asks."""
    if ticket is None:
        return ()
    return (Reply(ticket, Failed(serial=ticket.serial, code=code, message=message)),)


def not_running(ticket: Ticket) -> Effect:
    """Say that it does not run."""
    (reply,) = failed(ticket, ErrorCode.NOT_RUNNING, NOT_RUNNING)
    return reply
