"""Taps of this host's kernel: frames, filters, queues, and a device on them.

Each test has a network namespace of its own; the host's network is not touched.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from tests.unit.virtio.vhost_user.rig import connect, serving
from tests.virtio_driver import DriverQueue, PlainMemory
from tests.vmctl_driver import ROOT
from vmctl.foreground.nic_options import parse_nic
from vmctl.foreground.nics import open_nic
from vmm_kvm.errors import HaltError, SpecError
from vmm_kvm.memory import GuestMemory
from vmm_kvm.net.bridge import tap_on_bridge
from vmm_kvm.net.ethernet import Filter, locked_filter
from vmm_kvm.net.paths import StreamPath
from vmm_kvm.net.stream import Stream
from vmm_kvm.net.tap import HEADER_SIZE, Tap, open_tap, tap_name
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.device import Dataplane
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import NET, VhostUser
from vmm_kvm.virtio.worker import Worker

pytestmark = [pytest.mark.root]

NAME = "tap0"
MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
TYPE = b"\x88\xb5"  # for experiments on one's own network
HEADER = bytes(HEADER_SIZE)
WAIT_S = 10.0
# Of struct tpacket_auxdata. Source: Linux include/uapi/linux/if_packet.h
_SOL_PACKET, _PACKET_AUXDATA, _TP_STATUS_VLAN_VALID = 263, 8, 1 << 4
_ETH_P_ALL = 3
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """Put the main thread into a network namespace of its own, without IPv6's own traffic."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            pytest.skip("no network namespaces here")
        with suppress(FileNotFoundError):  # a kernel without IPv6
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        yield
        assert _libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


@contextmanager
def tap(queues: int = 1) -> Iterator[tuple[Tap, socket.socket]]:
    """Make a tap that is up, and a socket at its other end."""
    fds = open_tap(NAME, queues)
    try:
        subprocess.run(["ip", "link", "set", NAME, "up"], check=True)
        outside = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(int.from_bytes(TYPE, "big"))
        )
        with outside:
            outside.bind((NAME, int.from_bytes(TYPE, "big")))
            outside.settimeout(WAIT_S)
            yield Tap(fds, NAME), outside
    finally:
        for fd in fds:
            os.close(fd)


def frame(target: bytes, source: bytes = OTHER, size: int = 60) -> bytes:
    """Return a frame of `size` bytes."""
    return (target + source + TYPE).ljust(size, b"\xaa")


def arrived(device: Tap, queue: int = 0) -> list[bytes]:
    """Return the frames that wait in a queue, without their headers."""
    buffer = memoryview(bytearray(70000))
    found = []
    while size := device.receive(queue, [buffer]):
        found.append(bytes(buffer[HEADER_SIZE:size]))
    return found


def test_frames_pass_both_ways() -> None:
    """A frame sent at one end arrives at the other, in both directions."""
    with tap() as (device, outside):
        outside.send(frame(MAC))
        assert arrived(device) == [frame(MAC)]
        assert device.send(0, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


def test_the_kernel_checks_what_a_guest_says() -> None:
    """An invalid header loses its frame, and nothing else."""
    with tap() as (device, outside):
        nonsense = b"\1\xff" + b"\xff" * (HEADER_SIZE - 2)
        assert not device.send(0, [nonsense, frame(OTHER, MAC)])
        assert not device.send(0, [b"short"])
        assert device.send(0, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        (None, [MAC, OTHER, GROUP]),
        (Filter(MAC), [MAC, OTHER, GROUP]),
        (Filter(MAC, is_promiscuous=False), [MAC]),
        (Filter(MAC, is_promiscuous=False, group=frozenset({GROUP})), [MAC, GROUP]),
        (Filter(MAC, is_promiscuous=False, unicast=frozenset({OTHER})), [MAC, OTHER]),
        (locked_filter(MAC), [MAC, GROUP]),
    ],
)
def test_the_kernel_filters(wanted: Filter | None, targets: list[bytes]) -> None:
    """The kernel drops frames that the guest does not want."""
    with tap() as (device, outside):
        device.set_filter(wanted)
        for target in (MAC, OTHER, GROUP):
            outside.send(frame(target))
        assert arrived(device) == [frame(target) for target in targets]
        device.close()
        outside.send(frame(OTHER))
        assert arrived(device) == [frame(OTHER)]


def test_queues_come_and_go() -> None:
    """Only queues in use get frames, and setting the same number twice does no harm."""
    with tap(2) as (device, outside):
        for _ in range(2):
            device.set_queues(1)
        for _ in range(50):
            outside.send(frame(MAC))
        assert (len(arrived(device, 0)), arrived(device, 1)) == (50, [])
        for _ in range(2):
            device.set_queues(2)
        assert device.send(1, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


def test_what_is_no_tap() -> None:
    """Other descriptors, and taps of another kind, are refused with one line."""
    with Path("/dev/null").open("rb") as file, pytest.raises(SpecError, match="not a tap"):
        Tap([file.fileno()], NAME)
    with pytest.raises(SpecError, match="not the name of an interface"):
        open_tap("x" * 16)
    with tap(), pytest.raises(SpecError, match=f"{NAME}: "):
        open_tap(NAME)


def test_a_tap_on_a_bridge() -> None:
    """A tap is made, up, with its MTU, on the bridge, and is gone when it is closed."""
    subprocess.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)
    with pytest.raises(SpecError, match="nobr: no such bridge"):
        tap_on_bridge("nobr", 1, 1500)
    with pytest.raises(SpecError, match="lo: "):
        tap_on_bridge("lo", 1, 1500)
    fds = [*tap_on_bridge("br0", 1, 9000), *tap_on_bridge("br0", 2, 1500)]
    assert [tap_name(fd) for fd in fds] == ["vmm0", "vmm1", "vmm1"]
    shown = subprocess.run(
        ["ip", "link", "show", "vmm0"], check=True, capture_output=True, text=True
    ).stdout
    for expected in (",UP", " mtu 9000 ", " master br0 "):
        assert expected in shown
    for fd in fds:
        os.close(fd)
    assert {name for _, name in socket.if_nameindex()} == {"lo", "br0"}


class RecordingFrontend:
    """A Frontend that interrupts by eventfds of the test."""

    def __init__(self, calls: list[int]) -> None:
        self._calls = calls
        self.failures: list[str] = []

    def interrupt(self, index: int) -> None:
        """Write to the test's eventfd."""
        os.eventfd_write(self._calls[index], 1)

    def interrupt_fd(self, _index: int) -> int | None:
        """Return none: the device then calls `interrupt`."""
        return None

    def config_changed(self) -> None:
        """Ignore it."""

    def fail(self, reason: str) -> None:
        """Record the reason."""
        self.failures.append(reason)

    def halt(self, err: HaltError) -> None:
        """Fail: it must never be called."""
        raise err


def wait(fd: int) -> None:
    """Wait for an interrupt."""
    ready, _, _ = select.select([fd], [], [], WAIT_S)
    assert ready, "no interrupt"
    os.eventfd_read(fd)


class SharedMemory(PlainMemory):
    """Guest memory that a device process could map."""

    def __init__(self, guest: GuestMemory) -> None:
        self._view = guest.view(0, guest.size)
        self.bytes = self._view  # type: ignore[assignment]  # slices are as good


@contextmanager
def dataplane(kind: str, backend: VirtioNet, memory: GuestMemory) -> Iterator[Dataplane]:
    """Serve a device by a thread, or as a device process does."""
    if kind == "worker":
        worker = Worker(backend, memory, NAME)
        backend.attach(worker)
        yield worker
        worker.close()
        return
    ours, theirs = socket.socketpair()
    with serving(theirs, backend):
        device = VhostUser(Client(ours), memory, NAME, NET)
        assert device.config() == backend.config()
        yield device
        device.close()
    backend.close()


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("kind", ["worker", "vhost-user"])
def test_a_device_on_a_tap(kind: str, is_locked: bool) -> None:
    """Frames reach the driver's buffers and leave them; each arrival wakes the device's thread."""
    calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
    frontend = RecordingFrontend(calls)
    features = 1 << abi.VIRTIO_F_VERSION_1 | 1 << abi.VIRTIO_NET_F_MRG_RXBUF
    try:
        with GuestMemory([(0, 1 << 20)]) as guest, tap() as (port, outside):
            memory = SharedMemory(guest)
            backend = VirtioNet(port, MAC, name=NAME, is_locked=is_locked)
            with dataplane(kind, backend, guest) as device:
                assert len(device.queue_sizes) == 3
                device.attach(frontend)
                for _ in range(2):  # a driver may start again
                    guest.view(0, 0x4000)[:] = bytes(0x4000)
                    queues = [DriverQueue(memory, 8, base) for base in (0x1000, 0x2000)]
                    device.start(features, {at: queue.ring for at, queue in enumerate(queues)})
                    for number in range(20):
                        exchange(device, queues, outside, calls, number)
                    device.stop()
            del memory, queues
    finally:
        for fd in calls:
            os.close(fd)
    assert frontend.failures == []


@pytest.mark.parametrize("kind", ["worker", "vhost-user"])
def test_tagged_frames_and_groups(kind: str) -> None:
    """Frames of VLANs and to multicast groups pass unchanged in both directions, tags included."""
    calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
    frontend = RecordingFrontend(calls)
    features = 1 << abi.VIRTIO_F_VERSION_1 | 1 << abi.VIRTIO_NET_F_MRG_RXBUF
    tagged, twice = tag(frame(MAC), 5), tag(tag(frame(MAC), 7), 5)
    inward = [frame(GROUP), frame(b"\xff" * 6), tagged, twice, tag(frame(GROUP), 4095)]
    try:
        with ExitStack() as stack:
            guest = stack.enter_context(GuestMemory([(0, 1 << 20)]))
            port, outside = stack.enter_context(tap())
            everything = stack.enter_context(
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            )
            everything.bind((NAME, _ETH_P_ALL))
            everything.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            everything.settimeout(WAIT_S)
            memory = SharedMemory(guest)
            with dataplane(kind, VirtioNet(port, MAC, name=NAME), guest) as device:
                device.attach(frontend)
                queues = [DriverQueue(memory, 8, base) for base in (0x1000, 0x2000)]
                device.start(features, {at: queue.ring for at, queue in enumerate(queues)})
                shared = queues[0].memory
                for each in inward:
                    queues[0].add((0x10000, 1500, True))
                    device.kick(0)
                    outside.send(each)
                    used: list[tuple[int, int]] = []
                    while not used:
                        wait(calls[0])
                        used = queues[0].used()
                    assert bytes(shared[0x10000 + HEADER_SIZE : 0x10000 + used[0][1]]) == each
                for each in (frame(GROUP, MAC), tag(frame(OTHER, MAC), 5)):
                    shared[0x11000 : 0x11000 + HEADER_SIZE + len(each)] = HEADER + each
                    queues[1].add((0x11000, HEADER_SIZE + len(each), False))
                    device.kick(1)
                    assert with_tag(everything) == each
                    while not queues[1].used():
                        wait(calls[1])
                device.stop()
            del memory, queues, shared
    finally:
        for fd in calls:
            os.close(fd)
    assert frontend.failures == []


def tag(untagged: bytes, vlan: int) -> bytes:
    """Return a frame with a tag. Source: IEEE 802.1Q §9.6."""
    return untagged[:12] + b"\x81\x00" + vlan.to_bytes(2, "big") + untagged[12:]


def with_tag(outside: socket.socket) -> bytes:
    """Return the next frame from the guest, with its tag, which the kernel had taken out."""
    data, ancillary, _, address = outside.recvmsg(2000, 64)
    while address[2] == socket.PACKET_OUTGOING:
        data, ancillary, _, address = outside.recvmsg(2000, 64)
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, vlan = (
                struct.unpack_from("<I", value)[0],
                struct.unpack_from("<H", value, 16)[0],
            )
            if status & _TP_STATUS_VLAN_VALID:
                return tag(data, vlan)
    return data


def exchange(
    device: Dataplane,
    queues: list[DriverQueue],
    outside: socket.socket,
    calls: list[int],
    number: int,
) -> None:
    """Let one frame pass each way."""
    memory, at = queues[0].memory, 0x10000 + 0x1000 * (number % 8)
    queues[0].add((at, 1500, True))
    device.kick(0)
    outside.send(frame(MAC, size=60 + number))
    used: list[tuple[int, int]] = []
    while not used:  # an earlier interrupt may come first
        wait(calls[0])
        used = queues[0].used()
    received = bytes(memory[at + HEADER_SIZE : at + used[0][1]])
    assert received == frame(MAC, size=60 + number)
    memory[at : at + 72] = HEADER + frame(OTHER, MAC)
    queues[1].add((at, 72, False))
    device.kick(1)
    assert outside.recv(2000) == frame(OTHER, MAC)
    while not queues[1].used():
        wait(calls[1])


def test_vmm_net(tmp_path: Path) -> None:
    """vmm-net serves a tap to any front-end, and ends properly at a signal."""
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "vmm_kvm.commands.vmm_net", "--socket", str(path)]
    options = ["--lladdr", "fe:e1:bb:00:00:01", "--mtu", "9000", "--queues", "2", NAME]
    with subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.05)
            with GuestMemory([(0, 1 << 20)]) as guest:
                device = VhostUser(connect(str(path)), guest, NAME, NET)
                assert device.config() == MAC + struct.pack("<HHH", 1, 2, 9000)
                assert len(device.queue_sizes) == 5
                device.close()
        finally:
            process.terminate()
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--fd", "0", "x" * 16], f"vmm-net: {'x' * 16}: not the name of an interface\n"),
        (["--fd", "77", NAME], "vmm-net: descriptor 77: Bad file descriptor\n"),
    ],
)
def test_vmm_net_fails_with_one_line(options: list[str], error: str) -> None:
    """If something cannot be opened, one line says what, and why."""
    done = subprocess.run(
        [sys.executable, "-m", "vmm_kvm.commands.vmm_net", *options],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


def have_a_way_out() -> None:
    """Give this namespace what passt needs: 127.0.0.1, an interface, an address, a route."""
    commands = (
        "link set lo up",
        "link add out0 type veth peer name out1",
        "link set out0 up",
        "link set out1 up",
        "addr add 192.0.2.10/24 dev out0",
        "route add default via 192.0.2.1",
    )
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_passt() -> None:
    """A passt exists as long as its connection, and answers DHCP."""
    have_a_way_out()
    with ExitStack() as stack:
        nic = open_nic(parse_nic("passt,forward=tcp:8080:80"), 0, "web", stack)
        assert isinstance(nic.path, StreamPath)
        stream = Stream(nic.path.fd, nic.name, nic.path.traffic)
        source = nic.lladdr.hex(":")
        question = (
            Ether(src=source, dst="ff:ff:ff:ff:ff:ff")
            / IP(src="0.0.0.0", dst="255.255.255.255")
            / UDP(sport=68, dport=67)
            / BOOTP(chaddr=nic.lladdr, xid=7)
            / DHCP(options=[("message-type", "discover"), "end"])
        )
        assert stream.send(0, [HEADER, bytes(question)])
        buffer = memoryview(bytearray(70000))
        addresses: list[str] = []
        while not addresses:
            assert select.select([nic.path.fd], [], [], WAIT_S)[0]
            while size := stream.receive(0, [buffer]):
                frame = Ether(bytes(buffer[HEADER_SIZE:size]))
                addresses += [frame[BOOTP].yiaddr] if BOOTP in frame else []
        assert addresses == ["192.0.2.10"]
        assert nic.path.traffic.sent == len(question)
        assert nic.path.traffic.received > len(question)


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_passt_that_cannot_start() -> None:
    """If passt refuses to start, here for a port in use, one line says why."""
    have_a_way_out()
    with (
        socket.create_server(("", 8080)),
        ExitStack() as stack,
        pytest.raises(SpecError, match=r"^passt: [^\n]*(bind|listen)[^\n]*$"),
    ):
        open_nic(parse_nic("passt,forward=tcp:8080:80"), 0, "web", stack)
