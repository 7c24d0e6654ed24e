"""The consoles of VMs: a terminal for each; the VM is told when it is opened or closed."""

from collections.abc import Callable
from typing import NamedTuple

from vmd.parent.terminal_watch import TerminalWatch
from vmd.rules.vm import Vm
from vmd.shared.pty import Pty, open_pty
from vmd.shared.ring import Replay, replay


class _Console(NamedTuple):
    pty: Pty
    watch: int


class Consoles:
    """Owns the terminals of VMs, by their ids."""

    def __init__(self, terminals: TerminalWatch, on_look: Callable[[int], None]) -> None:
        """Begin without any; `on_look` gets the VM whose terminal was opened or closed."""
        self._terminals = terminals
        self._on_look = on_look
        self._consoles: dict[int, _Console] = {}

    def open(self, vm: Vm) -> Pty:
        """Return a VM's console: the one that it has, or a new one; it stays this object's.

        Raises:
            OSError: the host has no terminals or descriptors left.
        """
        console = self._consoles.get(vm.id)
        if console is None:
            owner, vm_id = vm.config.owner, vm.id
            pty = open_pty(vm.name, owner.uid or 0, owner.gid)
            try:
                watch = self._terminals.add(pty.name, lambda: self._on_look(vm_id))
            except OSError:
                pty.close()
                raise
            console = self._consoles[vm_id] = _Console(pty, watch)
        return console.pty

    def replay(self, vm_id: int) -> Replay:
        """Return the part of a VM's console output that a new client is shown first."""
        console = self._consoles.get(vm_id)
        return replay(console.pty.ring) if console else Replay(0, 0)

    def close(self, vm_id: int) -> None:
        """Give a VM's terminal back, if it has one."""
        console = self._consoles.pop(vm_id, None)
        if console:
            self._terminals.remove(console.watch)
            console.pty.close()

    def close_all(self) -> None:
        """Give all terminals back."""
        for vm_id in tuple(self._consoles):
            self.close(vm_id)
