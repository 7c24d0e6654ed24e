"""The network interfaces of `vmctl run`: from the command line to the machine's devices.

Taps and connections are opened once and outlive reboots.
"""

import hashlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from typing import Final

from vmctl.foreground.nic_options import NicKind, NicOption
from vmd.config.model import ForwardConfig
from vmm_kvm.errors import SpecError
from vmm_kvm.machine.net import NetSpec
from vmm_kvm.memfd import make_scratch
from vmm_kvm.net.bridge import tap_on_bridge
from vmm_kvm.net.paths import Path, RemotePath, StreamPath, TapPath, Traffic, VhostPath
from vmm_kvm.net.tap import Tap, open_tap
from vmm_kvm.virtio.net import VirtioNet

OPENBSD_PREFIX: Final = b"\xfe\xe1\xbb"
"""The first half of a default address, vmd(8)'s."""

_VHOST = "/dev/vhost-net"
_ADDRESS_REST = 3
_PASST_TIMEOUT_S = 5.0
_SOCKET_BUFFER = 4 << 20
_ANYONE_SEARCHES = 0o711
_ANYONE_WRITES = 0o622


def open_nic(option: NicOption, index: int, vm: str, stack: ExitStack) -> NetSpec:
    """Open interface number `index` of the machine named `vm`; `stack` closes it.

    Raises:
        SpecError: the tap or the socket cannot be opened, or passt is not there.
    """
    nic = NetSpec(
        option.lladdr or _address(vm, index),
        StreamPath(-1, Traffic()),
        f"nic{index}",
        option.mtu,
        option.is_locked,
        is_up=option.kind is not NicKind.NONE,
    )
    return nic._replace(path=_path(option, nic, stack))


def _path(option: NicOption, nic: NetSpec, stack: ExitStack) -> Path:
    match option.kind:
        case NicKind.TAP:
            return _tap(open_tap(option.what, option.queues), option, nic, stack)
        case NicKind.BRIDGE:
            taps = tap_on_bridge(option.what, option.queues, option.mtu)
            return _tap(taps, option, nic, stack)
        case NicKind.PASST:
            return StreamPath(_passt(option.forwards, stack), Traffic())
        case NicKind.STREAM:
            connection = stack.enter_context(_connect(option.what))
            return StreamPath(connection.fileno(), Traffic())
        case NicKind.VHOST_USER:
            return RemotePath(lambda: _connect(option.what), is_ours=False, pairs=option.queues)
        case NicKind.NONE:
            ours, theirs = socket.socketpair()
            theirs.close()
            return StreamPath(stack.enter_context(ours).fileno(), Traffic())


def _address(vm: str, index: int) -> bytes:
    """Return an address that is the same at every start of a VM of this name."""
    digest = hashlib.sha256(f"{vm}/{index}".encode(errors="surrogateescape")).digest()
    return OPENBSD_PREFIX + digest[:_ADDRESS_REST]


def _tap(taps: list[int], option: NicOption, nic: NetSpec, stack: ExitStack) -> Path:
    for fd in taps:
        stack.callback(os.close, fd)
    if option.is_process:
        process = _ProcessNic(nic, taps)
        stack.callback(process.close)
        return RemotePath(process.connect, is_ours=True)
    vhosts: list[int] = []
    # A locked address needs every frame checked: vhost-net's pass no code of ours.
    if not (option.is_user or option.is_locked):
        for _ in taps:
            try:
                fd = os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC)
            except OSError:  # not available: we can do without
                return TapPath(tuple(taps))
            stack.callback(os.close, fd)
            vhosts.append(fd)
    return VhostPath(tuple(taps), tuple(vhosts)) if vhosts else TapPath(tuple(taps))


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as err:
        connection.close()
        raise SpecError(f"{path}: {err.strerror or err}") from err
    return connection


def _passt(forwards: tuple[ForwardConfig, ...], stack: ExitStack) -> int:
    """Start passt; returns our end of its connection. It ends when that is closed."""
    program = shutil.which("passt")
    if program is None:
        raise SpecError("passt: not found (install the package passt, or use -i tap:NAME)")
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    # passt writes its pid when it is ready, and errors to standard error. New versions close
    # descriptors that they do not know, so the pid goes to a FIFO with a name.
    with (
        theirs,
        tempfile.TemporaryDirectory(prefix="vmctl-") as directory,
        os.fdopen(make_scratch("passt"), "w+b") as errors,
    ):
        fifo = f"{directory}/pid"
        told = _make_fifo(fifo)
        with os.fdopen(told, "rb", buffering=0):
            arguments = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno())]
            arguments += ["--pid", fifo]
            for forward in forwards:
                arguments += ["-t" if forward.protocol == "tcp" else "-u", forward.passt_ports]
            try:
                process = subprocess.Popen(
                    arguments,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    process_group=0,
                )
            except OSError as err:
                raise SpecError(f"{program}: {err.strerror}") from err
            stack.callback(_end, process, ours)
            theirs.close()
            if not _is_ready(process, told):
                errors.seek(0)
                raise SpecError(f"passt: {_reason(errors.read().decode(errors='replace'))}")
    return ours.fileno()


def _make_fifo(path: str) -> int:
    """Make a FIFO that any user may write to; returns its end to read from.

    As root, passt becomes another user, on some versions before it opens the file.
    """
    os.chmod(os.path.dirname(path), _ANYONE_SEARCHES)
    os.mkfifo(path)
    os.chmod(path, _ANYONE_WRITES)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _is_ready(process: subprocess.Popen[bytes], told: int) -> bool:
    """Wait until passt has written its pid to `told`; False if it ends or takes too long."""
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(told, select.POLLIN)
        poll.register(ended, select.POLLIN)
        events = dict(poll.poll(_PASST_TIMEOUT_S * 1000))
        return bool(events.get(told, 0) & select.POLLIN)
    finally:
        os.close(ended)


def _reason(said: str) -> str:
    """Return the last line of passt's output, without its words about syslog."""
    lines = [line for line in said.splitlines() if line and "to syslog" not in line]
    return lines[-1].strip() if lines else "it ended, and says nothing"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """End passt: it ends with its connection, else kill it."""
    connection.close()
    try:
        process.wait(_PASST_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _ProcessNic:
    """An interface with a process of its own for each machine."""

    def __init__(self, nic: NetSpec, taps: list[int]) -> None:
        self._nic = nic
        self._taps = taps
        self._close = ExitStack()

    def connect(self) -> socket.socket:
        """Start the process, when the one before has ended.

        Raises:
            VmmError: it cannot use the tap.
        """
        from vmm_kvm.virtio.vhost_user.process import (  # noqa: PLC0415 - few have it
            spawn_device_process,
        )

        self.close()
        process = self._close.enter_context(
            spawn_device_process(self._backend, self._nic.name, self._taps)
        )
        return process.connection

    def close(self) -> None:
        """Wait for the process to end; its connection is closed."""
        self._close.close()

    def _backend(self) -> VirtioNet:
        """Make the device; in its process."""
        nic = self._nic
        return VirtioNet(
            Tap(self._taps, nic.name),
            nic.lladdr,
            name=nic.name,
            mtu=nic.mtu,
            is_locked=nic.is_locked,
        )
