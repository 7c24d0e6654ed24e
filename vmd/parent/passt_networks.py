"""Networks without privileges: each local interface has a passt(1), as with `vmctl run -L`.

The guest's addresses are those that passt gives it; ports of the host lead to it as they do with
privileges. Switches need privileges: an interface on one, or on nothing, has no link.

passt speaks through a stream socket, and ends when that is closed. It stays from a VM's start to
its end, over reboots. If it ends before, the guest's link goes down; the next reboot tries again.

Source: passt(1)
"""

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from errno import EACCES, EADDRNOTAVAIL, EAFNOSUPPORT
from signal import SIGTERM

from msgspec.structs import replace

from vmd.config.model import Config, ForwardConfig
from vmd.confine.confinements import Kind
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface, Links, Then, Trouble, interface_infos
from vmd.parent.peer import AnyPeer
from vmd.rules.vm import Vm
from vmd.wire.internal import MadeTap, TapSpec
from vmd.wire.messages import ErrorCode, InterfaceInfo
from vmm_kvm.log import Log
from vmm_kvm.memfd import make_memory

log = Log(__name__)

_SOCKET_BUFFER = 4 << 20
_SAID_MAX = 16 << 10
"""Bytes of passt's output that are kept, from its beginning."""
_IDLE_TALK = ("to syslog", "Don't run as root")
_REASON_LINES = 3
_NO_FAMILY = {EAFNOSUPPORT, EADDRNOTAVAIL}
_FIRST_PORT = 1024


class _Stream:
    """One end of a stream of frames, and the process at the other; owns the descriptors."""

    __slots__ = ("fd", "passt", "problem", "said")

    def __init__(self, fd: int, *, passt: int = 0, said: int | None = None, problem: str) -> None:
        self.fd = fd
        self.passt = passt
        """The pid of the process at the other end; 0 if there is none."""
        self.said = said
        """Its messages."""
        self.problem = problem
        """Why there is none."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The guest's addresses, as far as passt has named them."""
        return () if self.said is None or not self.passt else _assigned(_lines(self.said))

    def close(self) -> None:
        """Let the process at the other end go."""
        os.close(self.fd)
        if self.said is not None:
            os.close(self.said)


class _Held:
    """One VM's network."""

    __slots__ = ("links", "streams", "vm")

    def __init__(self, vm: Vm, streams: list[_Stream]) -> None:
        self.vm = vm
        self.streams = streams
        self.links = self.links_now()

    def links_now(self) -> Links:
        """Return whether each interface has a link."""
        pairs = zip(self.vm.config.interfaces, self.streams, strict=True)
        return tuple(interface.is_up and bool(stream.passt) for interface, stream in pairs)


class PasstNetworks:
    """The interfaces of all VMs of an ordinary user; for one thread."""

    def __init__(self) -> None:
        """Begin with none."""
        self._held: dict[int, _Held] = {}
        self._pids: set[int] = set()
        self._leaving: set[int] = set()  # those that may still have a port
        self._waiting: list[tuple[Vm, Then]] = []
        self._trouble: Trouble = lambda _vm_id, _index, _text: None

    @property
    def peers(self) -> Mapping[Kind, AnyPeer]:
        """Peers that they need: none."""
        return {}

    @property
    def pids(self) -> Collection[int]:
        """Processes of passt that have not been reaped yet."""
        return self._pids

    def watch(self, trouble: Trouble) -> None:
        """Have `trouble` called when passt ends before its VM does."""
        self._trouble = trouble

    def reaped(self, pid: int, status: int) -> None:
        """Note that a child of this process has been reaped; its guest loses its network."""
        if pid not in self._pids:
            return
        self._pids.discard(pid)
        self._leaving.discard(pid)
        if self._waiting and not self._leaving:
            waiting, self._waiting = self._waiting, []
            for vm, then in waiting:
                self.attach(vm, then)
        for vm_id, held in self._held.items():
            for index, stream in enumerate(held.streams):
                if stream.passt == pid:
                    stream.passt = 0
                    stream.problem = f"passt has ended: {_reason(stream.said, status)}"
                    self._trouble(vm_id, index, f"no network: {stream.problem}")
                    return

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
        if self._leaving:
            self._waiting.append((vm, then))
            return
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
        with ExitStack() as stack:
            streams = []
            for index, interface in enumerate(vm.config.interfaces):
                stream = held.streams[index] if held else None
                # A guest that reboots gets another passt if the one that it had has ended.
                if stream is None or (interface.is_local and not stream.passt):
                    stream = _stream(interface.forwards, is_local=interface.is_local)
                    stack.callback(stream.close)
                    if stream.passt:
                        self._pids.add(stream.passt)
                streams.append(stream)
            stack.pop_all()
        if held:
            for stream in held.streams:
                if stream not in streams:
                    stream.close()
        held = self._held[vm.id] = _Held(vm, streams)
        for index, stream in enumerate(streams):
            if not stream.passt:
                self._trouble(vm.id, index, f"no network: {stream.problem}")
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
        """Set links as VMs are configured now; see `Networks.refresh`."""
        changed = {}
        for vm_id, held in self._held.items():
            before, held.links = held.links, held.links_now()
            if held.links != before:
                changed[vm_id] = held.links
        return changed

    def told(self, vm: Vm) -> tuple[InterfaceInfo, ...]:
        """Return the description of a VM's interfaces."""
        infos = interface_infos(vm.config.interfaces, ())
        held = self._held.get(vm.id)
        if held is None:
            return infos
        return tuple(
            replace(info, is_up=has_link, problem=stream.problem, guest_addresses=stream.addresses)
            for info, has_link, stream in zip(infos, held.links, held.streams, strict=True)
        )

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces; their processes end."""
        self._waiting = [one for one in self._waiting if one[0].id != vm_id]
        held = self._held.pop(vm_id, None)
        if held is None:
            return
        for stream, interface in zip(held.streams, held.vm.config.interfaces, strict=True):
            stream.close()
            if stream.passt and interface.forwards:
                self._leaving.add(stream.passt)
                os.kill(stream.passt, SIGTERM)  # it is ours until it is reaped

    def close(self) -> None:
        """Remove all interfaces."""
        for vm_id in tuple(self._held):
            self.release(vm_id)


def _stream(forwards: Sequence[ForwardConfig], *, is_local: bool) -> _Stream:
    """Return a stream of frames, with a passt at the other end if possible."""
    from shutil import which  # noqa: PLC0415 - every child would inherit all that it imports

    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = which("passt") if is_local else None
        problem = ""
        if not is_local:
            problem = "switches need root"
        elif program is None:
            problem = "passt is not installed"
        else:
            problem = next(filter(None, map(port_problem, forwards)), "")
        if problem or program is None:
            return _Stream(ours.detach(), problem=problem)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        said = make_memory("passt", _SAID_MAX)
        try:
            passt = _spawn(program, theirs.fileno(), said, forwards)
        except OSError as err:
            os.close(said)
            return _Stream(ours.detach(), problem=f"passt cannot be run: {program}: {err.strerror}")
        return _Stream(ours.detach(), passt=passt, said=said, problem="")


def port_problem(forward: ForwardConfig) -> str:
    """Return the reason why passt could not get a port of this host; empty if it can.

    passt itself continues if it gets the port of only one address family.
    """
    address = forward.address
    if not address:
        tries = [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]  # noqa: S104 - as passt does
    else:
        tries = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address)]
    is_tcp = forward.protocol == "tcp"
    kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM
    for family, tried in tries:
        try:
            with socket.socket(family, kind) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if is_tcp:  # connections closed a moment ago do not count
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((tried, forward.port))
        except OSError as err:
            if address or err.errno not in _NO_FAMILY:
                return _port_text(forward, err)
    return ""


def _port_text(forward: ForwardConfig, err: OSError) -> str:
    advice = ""
    if err.errno == EACCES:
        advice = f" (take one from {_first_port()} on)"
    where = forward.address or "this host"
    return f"{forward.protocol} port {forward.port} of {where}: {err.strerror}{advice}"


def _first_port() -> int:
    """Return the first port that needs no privileges."""
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "rb") as file:  # noqa: PTH123 - the plainest
            return int(file.read())
    except (OSError, ValueError):
        return _FIRST_PORT


def _lines(said: int) -> list[str]:
    """Return passt's lines, except those about itself."""
    text = os.pread(said, _SAID_MAX, 0).rstrip(b"\0").decode(errors="replace")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not any(word in line for word in _IDLE_TALK)]


def _reason(said: int | None, status: int) -> str:
    """Return the end of passt's output, in one line; else how it ended."""
    lines = [] if said is None else _lines(said)[-_REASON_LINES:]
    text = "; ".join(lines)
    if "routable interface" in text:
        text += " (is this host offline?)"
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return text or f"{how}, and it does not say why"


def _assigned(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses that passt says it assigns to the guest."""
    return tuple(line.partition(" ")[2].strip() for line in lines if line.startswith("assign:"))


def _spawn(program: str, stream: int, said: int, forwards: Sequence[ForwardConfig]) -> int:
    """Start passt with one end of a socket, its output going to `said`; returns its pid."""
    # The duplicate is open in the new process, as the original is not.
    fd = os.dup(stream)
    os.set_inheritable(fd, True)
    arguments = [program, "--foreground", "--fd", str(fd)]
    for forward in forwards:
        arguments += ["-t" if forward.protocol == "tcp" else "-u", forward.passt_ports]
    try:
        return os.posix_spawn(
            program,
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, said, 2),
            ],
            # Terminal input is for the daemon alone.
            setpgroup=0,
            setsigmask=(),
        )
    finally:
        os.close(fd)
