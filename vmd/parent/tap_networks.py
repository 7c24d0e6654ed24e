"""Networks of taps: this module opens each VM's, and priv configures them.

Only priv changes the host's network. This module opens /dev/net/tun and passes its descriptors
along; they keep the taps alive as long as their VM exists, so that a rebooting guest finds the same
ones. On local interfaces, the local process answers the guest; its sockets are opened here too.

A VM waits for its interfaces before it is launched. Where there is no priv, or the host has no
taps, VMs run without.

Source: section 12 of OpenBSD's behaviour, with the advice of its section 21.
"""

import os
from collections.abc import Collection, Mapping
from typing import assert_never

from msgspec.structs import replace

from vmd.config.model import Config
from vmd.confine.confinements import Kind
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface, Links, Then, Trouble, interface_infos
from vmd.parent.local_interfaces import LocalInterfaces
from vmd.parent.peer import AnyPeer, Peer
from vmd.parent.taps import TapPlan, taken_forwards
from vmd.rules.vm import Vm
from vmd.wire.channel import Fds, Loop
from vmd.wire.internal import (
    PARENT_AND_PRIV,
    Configured,
    ForgetTaps,
    InterfaceTrouble,
    MadeTap,
    MakeTaps,
    ParentToPriv,
    PrivToParent,
    RulesRefused,
    TapsFailed,
    TapsForgotten,
    TapsMade,
    TapSpec,
)
from vmd.wire.messages import ErrorCode, InterfaceInfo
from vmm_kvm.log import Log

log = Log(__name__)

TUN = "/dev/net/tun"


class _Held:
    """One VM's network; owns the descriptors of its taps."""

    __slots__ = (
        "attached",
        "fds",
        "is_filtered",
        "links",
        "problems",
        "sent",
        "specs",
        "then",
        "troubles",
        "vm",
    )

    def __init__(self, vm: Vm, specs: tuple[TapSpec, ...], links: Links, then: Then) -> None:
        self.vm = vm
        self.specs = self.sent = specs
        self.links = links
        self.fds: list[int] = []
        self.then: Then | None = then
        self.attached: tuple[MadeTap, ...] = ()
        self.is_filtered = False
        self.problems: dict[int, str] = {}
        """By index of the interface: the reasons why the packet filter refuses its rules."""
        self.troubles: dict[int, str] = {}
        """By index: why it is not what was asked for."""

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def problem(self, index: int) -> str:
        """Return what is wrong with an interface, in one line."""
        return "; ".join(filter(None, (self.troubles.get(index), self.problems.get(index))))

    def interfaces(self) -> tuple[Interface, ...]:
        """Return the existing interfaces; none before priv has made them."""
        if not self.attached:
            return ()
        return tuple(
            Interface(
                spec,
                tap,
                tuple(self.fds[at] for at in spec.queues),
                self.is_filtered or not spec.config.is_locked,
                has_link=has_link,
            )
            for spec, tap, has_link in zip(self.specs, self.attached, self.links, strict=True)
        )


class TapNetworks:
    """Networks of all VMs, on the event loop's thread."""

    def __init__(self, loop: Loop, socket_path: str | None, *, tun: str = TUN) -> None:
        """Begin with none.

        `socket_path` distinguishes this daemon's objects from those of others on the same host.
        `tun` is the path to open for each queue.
        """
        self._tun = tun
        self._plan = TapPlan(socket_path)
        self._held: dict[int, _Held] = {}
        self._leaving: dict[int, _Held] = {}
        self._waiting: list[tuple[Vm, Then]] = []
        self._trouble: Trouble = lambda _vm_id, _index, _text: None
        self._priv: Peer[ParentToPriv, PrivToParent] = Peer(
            "priv",
            PARENT_AND_PRIV,
            loop,
            self._from_priv,
            on_start=self._tell_all,
            on_end=self._priv_ended,
            on_give_up=self._give_up,
        )
        self._local = LocalInterfaces(loop, self._serve_all)

    @property
    def peers(self) -> Mapping[Kind, AnyPeer]:
        """The processes that they need."""
        return {Kind.PRIV: self._priv, Kind.LOCAL: self._local.peer}

    @property
    def pids(self) -> Collection[int]:
        """Other children: none."""
        return ()

    def watch(self, trouble: Trouble) -> None:
        """Call `trouble` when a rule of an interface is refused."""
        self._trouble = trouble

    def reaped(self, pid: int, status: int) -> None:
        """Do nothing: no child is ours."""

    def close(self) -> None:
        """Remove all interfaces: they end with their descriptors."""
        for held in (*self._held.values(), *self._leaving.values()):
            held.close()
        self._held.clear()
        self._leaving.clear()

    # Processes

    def _tell_all(self) -> None:
        """Have a new priv process configure the host's network."""
        if not self._plan.is_configured:
            return
        # Existing interfaces come first, so that their rules are not missing meanwhile.
        self._priv.send(self._plan.configuration(is_partial=True))
        for vm_id, held in self._held.items():
            held.troubles.clear()  # it tells of those that are left
            if held.attached:
                self._attach(vm_id, held)
        self._priv.send(self._plan.configuration())
        for vm_id, held in tuple(self._held.items()):
            if not held.attached:
                self._attach(vm_id, held)

    def _priv_ended(self) -> None:
        """Wait for another priv process, and drop references to taps that are about to go."""
        for vm_id in tuple(self._leaving):
            self._left(vm_id)

    def _give_up(self) -> None:
        """Fail all requests that wait for a priv process: there will be no other."""
        waiting, self._waiting = self._waiting, []
        for _, then in waiting:
            then(ResourceError(ErrorCode.EAGAIN, "there is no priv process"))
        for vm_id, held in tuple(self._held.items()):
            if not held.attached:
                self._fail(vm_id, held, "there is no priv process")

    def _serve_all(self) -> None:
        for held in self._held.values():
            self._local.serve(held.vm, held.interfaces())

    # Configuration

    def configure(self, config: Config) -> None:
        """Configure the host's network as in a vm.conf; running VMs keep their addresses."""
        self._plan.configure(config)
        self._priv.send(self._plan.configuration())

    def add(self, config: Config) -> None:
        """Add the switches of another file; of two with the same name the first counts."""
        self._plan.add(config)
        if self._plan.is_configured:
            self._priv.send(self._plan.configuration())

    def forget_switches(self) -> None:
        """Remove all switches; interfaces stay on bridges that are not ours."""
        self._plan.forget_switches()
        self._priv.send(self._plan.configuration())

    # Interfaces of VMs

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, or find them from before its reboot; then call `then`, once."""
        held = self._held.get(vm.id)
        if not vm.config.interfaces:
            then(())
        elif held is not None and held.then is None:
            then(held.interfaces())
        elif not os.path.exists(self._tun):  # noqa: PTH110 - the plainest way
            log.warning("vm/%s: started without its interfaces: %s is missing", vm.name, self._tun)
            then(())
        elif self._leaving:
            # Their names may be those that it wants.
            self._waiting.append((vm, then))
        else:
            self._begin(vm, then)

    def _begin(self, vm: Vm, then: Then) -> None:
        taken = taken_forwards((held.vm.name, held.specs) for held in self._held.values())
        try:
            held = _Held(vm, self._plan.specs(vm, taken), self._plan.links(vm), then)
        except ResourceError as err:
            then(err)
            return
        self._held[vm.id] = held
        self._attach(vm.id, held)

    def _attach(self, vm_id: int, held: _Held) -> None:
        """Ask priv for interfaces, or tell a new priv of existing ones."""
        if not self._priv.is_there:
            return  # the next one gets it
        held.sent = held.specs
        if held.attached:
            specs = zip(held.specs, held.attached, strict=True)
            there = tuple(
                replace(spec, config=spec.config._replace(tap=tap.name), queues=())
                for spec, tap in specs
            )
            self._priv.send(MakeTaps(id=vm_id, taps=there))
            return
        try:
            # A descriptor can become a queue only once, and a crashed priv may have done that.
            held.close()
            for _ in range(sum(len(spec.queues) for spec in held.specs)):
                held.fds.append(os.open(self._tun, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fds = tuple(os.dup(fd) for fd in held.fds)
        except OSError as err:
            self._fail(vm_id, held, f"{self._tun}: {err.strerror}")
            return
        self._priv.send(MakeTaps(id=vm_id, taps=held.specs), fds)

    def refresh(self) -> Mapping[int, Links]:
        """Bring interfaces up and down as VMs and switches are configured now.

        Returns the links, by id, of the VMs for whose guests this changes something.
        """
        changed = {}
        for vm_id, held in self._held.items():
            states = [interface.is_up for interface in held.vm.config.interfaces]
            specs = tuple(
                replace(spec, config=spec.config._replace(is_up=is_up))
                for spec, is_up in zip(held.specs, states, strict=True)
            )
            links = self._plan.links(held.vm)
            if links != held.links:
                held.links = changed[vm_id] = links
            if specs != held.specs:
                held.specs = specs
                if held.attached:
                    self._attach(vm_id, held)
        return changed

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces, if it has any."""
        self._waiting = [one for one in self._waiting if one[0].id != vm_id]
        held = self._held.pop(vm_id, None)
        if held is None:
            return
        self._local.forget(vm_id)
        if not self._priv.is_there:
            held.close()
            return
        self._leaving[vm_id] = held
        self._priv.send(ForgetTaps(id=vm_id))

    def _left(self, vm_id: int) -> None:
        held = self._leaving.pop(vm_id, None)
        if held is not None:
            held.close()
        if not self._leaving:
            waiting, self._waiting = self._waiting, []
            for vm, then in waiting:
                self.attach(vm, then)

    def _fail(self, vm_id: int, held: _Held, message: str) -> None:
        then, held.then = held.then, None
        self.release(vm_id)
        if then:
            then(ResourceError(ErrorCode.EIO, message))

    # Messages of priv

    def _from_priv(self, message: PrivToParent, _fds: Fds) -> None:
        match message:
            case Configured():
                return
            case TapsMade(id=vm_id, taps=taps, is_filtered=is_filtered):
                held = self._held.get(vm_id)
                if held is not None and len(taps) == len(held.specs):
                    self._attached(held, taps, is_filtered=is_filtered)
            case TapsFailed(id=vm_id, message=text):
                held = self._held.get(vm_id)
                if held is not None:
                    self._fail(vm_id, held, text)
            case TapsForgotten(id=vm_id):
                self._left(vm_id)
            case RulesRefused(id=vm_id, index=index, message=text):
                held = self._held.get(vm_id)
                if held is not None and 0 <= index < len(held.specs):
                    before = held.problems.get(index)
                    held.problems[index] = f"{before}; {text}" if before else text
                    self._trouble(vm_id, index, text)
            case InterfaceTrouble(id=vm_id, index=index, message=text):
                held = self._held.get(vm_id)
                if held is not None and 0 <= index < len(held.specs):
                    if text and held.troubles.get(index) != text:
                        self._trouble(vm_id, index, text)
                    held.troubles[index] = text
            case _:
                assert_never(message)

    def _attached(self, held: _Held, taps: tuple[MadeTap, ...], *, is_filtered: bool) -> None:
        then, held.then = held.then, None
        if then is not None:  # else it was told to a new priv process
            held.attached, held.is_filtered = taps, is_filtered
            self._local.serve(held.vm, held.interfaces())
            if held.sent != held.specs:  # they have changed meanwhile
                self._attach(held.vm.id, held)
            then(held.interfaces())

    # Looking

    def told(self, vm: Vm) -> tuple[InterfaceInfo, ...]:
        """Return the description of a VM's interfaces."""
        held = self._held.get(vm.id)
        if held is None:
            return interface_infos(vm.config.interfaces, ())
        infos = interface_infos(vm.config.interfaces, held.interfaces())
        return tuple(replace(info, problem=held.problem(index)) for index, info in enumerate(infos))
