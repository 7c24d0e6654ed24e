"""`vmctl run --gdb`: a socket through which GDB debugs the guest."""

from collections.abc import Callable, Sequence

from vmctl.values import once
from vmm_kvm.errors import SpecError
from vmm_kvm.gdb.server import GdbServer
from vmm_kvm.loop import EventLoop


def open_server(
    given: Sequence[str], loop: EventLoop, quit_: Callable[[str | None], None]
) -> GdbServer:
    """Listen where --gdb says, which is `path[,wait]`; `quit_(None)` ends the VM for a debugger.

    Raises:
        SpecError: there is no path, several, or nobody can listen there.
    """
    text = once(given, "gdb socket") or ""
    path = text.removesuffix(",wait")
    if not path:
        raise SpecError("--gdb: no socket named: path[,wait]")
    try:
        return GdbServer(loop, path, lambda: quit_(None), waits=path != text)
    except OSError as err:
        raise SpecError(f"{path}: {err.strerror or err}") from err
