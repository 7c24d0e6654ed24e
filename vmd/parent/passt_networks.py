"""Networks without privileges: each local interface has a passt(1), as `vmctl run -L` has.

The guest's addresses are those that passt gives it; ports of the host lead to it as they do with
privileges. A switch needs these: an interface on one, or on nothing, has no cable.

passt speaks through a stream socket, and ends when that is closed. It stays from a VM's start to
its end, over reboots.

Source: passt(1)
"""

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from msgspec.structs import replace

from vmd.config.model import Config, ForwardConfig
from vmd.confine.confinements import Kind
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface, Links, Then, interface_infos
from vmd.parent.peer import AnyPeer
from vmd.rules.vm import Vm
from vmd.wire.internal import MadeTap, TapSpec
from vmd.wire.messages import ErrorCode, InterfaceInfo
from vmm_kvm.log import Log

log = Log(__name__)

_SOCKET_BUFFER = 4 << 20


class _Stream(NamedTuple):
    """One end of a stream of frames; whoever holds it owns the descriptor."""

    fd: int
    is_connected: bool
    """There is somebody at the other end."""


class _Held:
    """What there is of one VM's network."""

    __slots__ = ("links", "streams", "vm")

    def __init__(self, vm: Vm, streams: Sequence[_Stream]) -> None:
        self.vm = vm
        self.streams = streams
        self.links = self.links_now()

    def links_now(self) -> Links:
        """Return whether each cable leads somewhere, and is to be plugged in."""
        pairs = zip(self.vm.config.interfaces, self.streams, strict=True)
        return tuple(interface.is_up and stream.is_connected for interface, stream in pairs)


class PasstNetworks:
    """The interfaces of all VMs of an ordinary user; for one thread."""

    def __init__(self) -> None:
        """Begin with none."""
        self._held: dict[int, _Held] = {}
        self._pids: set[int] = set()

    @property
    def peers(self) -> Mapping[Kind, AnyPeer]:
        """The processes that they need: none that the parent talks to."""
        return {}

    @property
    def pids(self) -> Collection[int]:
        """Processes of passt that have not been reaped yet."""
        return self._pids

    def reaped(self, pid: int) -> None:
        """Note that a child of this process has been reaped."""
        self._pids.discard(pid)

    def configure(self, config: Config) -> None:
        """Take note of a vm.conf: there can be no switches."""
        if any(switch.is_enabled for switch in config.switches):
            log.warning("no switches: they need root")

    def add(self, config: Config) -> None:
        """Take note of another file."""

    def forget_switches(self) -> None:
        """Have no switches, as before."""

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, or find them from before its reboot; then call `then`, once."""
        try:
            interfaces = self._interfaces(vm)
        except OSError as err:
            then(ResourceError(ErrorCode.EIO, f"passt: {err.strerror}"))
        else:
            then(interfaces)

    def _interfaces(self, vm: Vm) -> tuple[Interface, ...]:
        if not vm.config.interfaces:
            return ()
        held = self._held.get(vm.id)
        if held is None:
            with ExitStack() as stack:
                streams = []
                for index, interface in enumerate(vm.config.interfaces):
                    name = f"vm/{vm.name}: interface {index}"
                    stream = self._stream(name, interface.forwards, is_local=interface.is_local)
                    stack.callback(os.close, stream.fd)
                    streams.append(stream)
                stack.pop_all()
            held = self._held[vm.id] = _Held(vm, streams)
        return tuple(
            Interface(
                TapSpec(config=interface, alias=f"nic{index}"),
                MadeTap(name="", index=0),
                queues=(),
                may_vhost=False,
                stream=stream.fd,
                has_link=has_link,
            )
            for index, (interface, stream, has_link) in enumerate(
                zip(vm.config.interfaces, held.streams, held.links, strict=True)
            )
        )

    def refresh(self) -> Mapping[int, Links]:
        """Plug cables in and out as VMs are configured now; see `Networks.refresh`."""
        changed = {}
        for vm_id, held in self._held.items():
            before, held.links = held.links, held.links_now()
            if held.links != before:
                changed[vm_id] = held.links
        return changed

    def told(self, vm: Vm) -> tuple[InterfaceInfo, ...]:
        """Return what there is to tell of a VM's interfaces."""
        infos = interface_infos(vm.config.interfaces, ())
        held = self._held.get(vm.id)
        if held is None:
            return infos
        return tuple(
            replace(info, is_up=has_link) for info, has_link in zip(infos, held.links, strict=True)
        )

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces; their processes end."""
        held = self._held.pop(vm_id, None)
        if held is not None:
            for stream in held.streams:
                os.close(stream.fd)

    def close(self) -> None:
        """Remove all interfaces."""
        for vm_id in tuple(self._held):
            self.release(vm_id)

    def _stream(self, name: str, forwards: Sequence[ForwardConfig], *, is_local: bool) -> _Stream:
        from shutil import which  # noqa: PLC0415 - every child would inherit all that it imports

        ours, theirs = socket.socketpair()
        with ours, theirs:
            program = which("passt") if is_local else None
            if program is not None:
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
                self._pids.add(_spawn(program, theirs.fileno(), forwards))
            elif is_local:
                log.warning("%s: no network: passt is not installed", name)
            else:
                log.warning("%s: no network: switches need root", name)
            return _Stream(ours.detach(), is_connected=program is not None)


def _spawn(program: str, stream: int, forwards: Sequence[ForwardConfig]) -> int:
    """Start passt with one end of a socket; returns its pid."""
    # The duplicate is open in the new process, as the original is not.
    fd = os.dup(stream)
    os.set_inheritable(fd, True)
    arguments = [program, "--foreground", "--quiet", "--fd", str(fd)]
    for forward in forwards:
        arguments += ["-t" if forward.protocol == "tcp" else "-u", forward.passt_ports]
    try:
        return os.posix_spawn(
            program,
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)
            ],
            # What is typed at a terminal is for the daemon alone.
            setpgroup=0,
            setsigmask=(),
        )
    finally:
        os.close(fd)
