"""`vmctl run --gdb`: a socket through which GDB debugs the guest."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from vmctl.values import once
from vmm_kvm.errors import SpecError
from vmm_kvm.gdb.server import GdbListener, GdbServer
from vmm_kvm.loop import EventLoop


def open_server(
    given: Sequence[str], loop: EventLoop, quit_: Callable[[str | None], None], stack: ExitStack
) -> GdbServer:
    """Listen where --gdb says, which is `path[,wait]`; `quit_(None)` ends the VM for a debugger.

    `stack` ends it.

    Raises:
        SpecError: there is no path, several, or an unusable one.
    """
    text = once(given, "gdb socket") or ""
    path, comma, option = text.rpartition(",")
    if not comma:
        path, option = text, ""
    elif option != "wait":
        raise SpecError(f"--gdb: unknown option {option!r} (wait)")
    if not path:
        raise SpecError("--gdb: no socket named: path[,wait]")
    server = GdbServer(loop, lambda: quit_(None), waits=bool(option))
    try:
        listener = GdbListener(loop, path, server)
    except OSError as err:
        raise SpecError(f"{path}: {err.strerror or err}") from err
    stack.callback(listener.close)
    stack.callback(server.close)
    return server
