"""virtio-vsock in machines on real KVM, by a driver of the tests; and `vmctl run --vsock`."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fakes import FakeClock
from tests.virtio_driver import DriverQueue
from tests.virtio_pci_driver import BusDriver
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run
from tests.vsock_driver import CID, Got, GuestStream, VsockDriver
from vmd.confine.confinements import CONFINEMENTS, Kind
from vmd.confine.sandbox import confine
from vmm_kvm.arch.x86.image import BootImage, open_image
from vmm_kvm.bits import MIB
from vmm_kvm.boot.firmware import selftest_path
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.machine import clone
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec
from vmm_kvm.machine.state import restore, save
from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.primitives import Vmm
from vmm_kvm.virtio.vsock import VsockSpec
from vmm_kvm.virtio.vsock_packet import Op, Shutdown

pytestmark = pytest.mark.kvm

DEADLINE_S = 30
RAM_SIZE = 16 * MIB
_SLOT = 1
_QUEUES, _PACKETS = MIB, 2 * MIB
_BULK = 3 * MIB
_READY_S = 30.0


@dataclass
class Guest:
    """A machine whose vCPUs do nothing, and a driver of its vsock device in this process."""

    machine: Machine
    driver: VsockDriver
    waiting: deque[Got] = field(default_factory=deque)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for the effect of the device's thread."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "the device does nothing"
            time.sleep(0.001)

    def packet(self) -> Got:
        """Wait for the next packet, and return its buffer."""

        def has_come() -> bool:
            self.waiting.extend(self.driver.packets())
            return bool(self.waiting)

        self.wait(has_come)
        self.driver.offer()
        return self.waiting.popleft()


@dataclass
class Stand:
    """The resources of machines."""

    vmm: Vmm
    stack: ExitStack
    dialled: list[socket.socket]
    image: BootImage = field(default_factory=lambda: open_image(str(selftest_path())))
    pairs: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)
    """Pairs made beforehand, for a process that may make none."""

    def dial(self, port: int) -> HostStream | None:
        """Connect to port 7; no other port listens."""
        if port != 7:
            return None
        ours, theirs = self.pair()
        self.dialled.append(ours)
        return HostStream(theirs)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Make connected sockets; the stand closes the first one at the end."""
        ours, theirs = self.pairs.pop() if self.pairs else socket.socketpair()
        self.stack.callback(ours.close)
        ours.settimeout(DEADLINE_S)
        return ours, theirs

    def machine(self, *, is_restored: bool = False) -> Machine:
        """Build a machine with a vsock device alone."""
        spec = MachineSpec(
            image=self.image, memory_size=RAM_SIZE, devices=(VsockSpec(CID, self.dial),)
        )
        return self.stack.enter_context(
            Machine(
                spec,
                self.vmm,
                FakeClock(),
                transmit=lambda _: None,
                on_receive_room=lambda: None,
                on_outcome=lambda _: None,
                is_restored=is_restored,
            )
        )

    def guest(self) -> Guest:
        """Build a guest, and start its device."""
        machine = self.machine()
        bus, queues = BusDriver(machine.pio, machine.mmio, _SLOT), self.queues(machine)
        bus.start(queues, msix=False)
        driver = self.driver(machine, bus, queues)
        driver.offer()
        guest = Guest(machine, driver)
        driver.send(Op.RW, (1, 1))
        assert guest.packet().op == Op.RST  # by now the device has started
        return guest

    @staticmethod
    def queues(machine: Machine) -> dict[int, DriverQueue]:
        """Return the queues of a driver."""
        ram = machine.memory.view(0, RAM_SIZE)
        return {index: DriverQueue(ram, 64, _QUEUES + 0x4000 * index) for index in range(3)}

    @staticmethod
    def driver(_machine: Machine, bus: BusDriver, queues: dict[int, DriverQueue]) -> VsockDriver:
        """Return a driver of queues that are set up already."""

        def notify(index: int) -> None:
            bus.pio.write(bus.notify_port(index), 2, index)

        return VsockDriver(queues, _PACKETS, notify)

    def connect(self, machine: Machine, port: int) -> socket.socket:
        """Connect to the guest."""
        ours, theirs = self.pair()
        assert machine.vsock
        machine.vsock.connect(HostStream(theirs), port)
        return ours

    def from_host(self, guest: Guest) -> tuple[GuestStream, socket.socket]:
        """Open a connection from the host."""
        sock = self.connect(guest.machine, 22)
        request = guest.packet()
        assert request.op == Op.REQUEST
        stream = GuestStream(guest.driver, (22, request.header.src_port))
        stream.take(request)
        guest.driver.send(Op.RESPONSE, stream.ports)
        assert sock.recv(64) == b"OK %d\n" % request.header.src_port
        return stream, sock


@pytest.fixture
def stand() -> Iterator[Stand]:
    """Machines on real KVM."""
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, ExitStack() as stack:
        yield Stand(vmm, stack, [])


def test_megabytes_in_both_directions(stand: Stand) -> None:
    """Data flow in both directions at once, with credit, through a slow reader, without loss."""
    guest = stand.guest()
    stream, sock = stand.from_host(guest)
    chance = random.Random(1)
    sent, answered = chance.randbytes(_BULK), chance.randbytes(_BULK)
    read = bytearray()

    def client() -> None:
        writer = threading.Thread(target=sock.sendall, args=(answered,))
        writer.start()
        while piece := sock.recv(1 << 16):
            read.extend(piece)
        writer.join()

    reader = threading.Thread(target=client)
    reader.start()
    at, deadline = 0, time.monotonic() + 2 * DEADLINE_S
    while at < len(sent) or len(stream.received) < len(answered):
        assert time.monotonic() < deadline
        at += stream.write(sent[at : at + 0x8000])
        packets = guest.driver.packets()
        for packet in packets:
            stream.take(packet)
        guest.driver.offer()
        if not packets:
            time.sleep(0.0005)
    stream.shut(Shutdown.SEND)
    reader.join(DEADLINE_S)
    assert not reader.is_alive()
    assert bytes(read) == sent
    assert bytes(stream.received) == answered


def test_the_guest_opens_connections(stand: Stand) -> None:
    """A guest's connection to a listener succeeds, others are refused; a device reset ends them."""
    guest = stand.guest()
    guest.driver.send(Op.REQUEST, (5, 6))
    assert guest.packet().op == Op.RST
    guest.driver.send(Op.REQUEST, (5, 7))
    assert guest.packet().op == Op.RESPONSE
    (sock,) = stand.dialled
    sock.send(b"from the host")
    assert guest.packet().data == b"from the host"
    BusDriver(guest.machine.pio, guest.machine.mmio, _SLOT).status = 0
    assert sock.recv(1) == b""


def test_a_machine_that_stands_still(stand: Stand) -> None:
    """While paused no data move, connections survive, and new ones wait."""
    guest = stand.guest()
    stream, sock = stand.from_host(guest)
    guest.machine.pause()
    sock.send(b"meanwhile")
    waiting = stand.connect(guest.machine, 23)
    time.sleep(0.05)
    assert guest.driver.packets() == []
    guest.machine.resume()
    first, second = guest.packet(), guest.packet()
    assert sorted((first.op, second.op)) == [Op.REQUEST, Op.RW]
    stream.write(b"still")
    assert sock.recv(64) == b"still"
    guest.machine.pause()
    assert waiting.fileno() >= 0


def test_a_restored_machine_has_no_connections(stand: Stand) -> None:
    """A restored guest gets the reset event, and connects anew; the source's connections live."""
    guest = stand.guest()
    stream, sock = stand.from_host(guest)
    guest.machine.pause()
    state, memory = save(guest.machine), guest.machine.memory.read(0, RAM_SIZE)
    second = stand.machine(is_restored=True)
    second.memory.write(0, memory)
    restore(second, state)
    other = _successor(guest, second)
    second.resume()
    other.driver.offer_event()
    other.wait(lambda: other.driver.events() == [0])
    other.driver.offer_event()  # it has handled the event
    other.driver.send(Op.RW, stream.ports, b"old")
    assert other.packet().op == Op.RST
    _works(stand, other)
    second.pause()
    guest.machine.resume()
    stream.write(b"still")
    assert sock.recv(64) == b"still"
    guest.machine.pause()


def _works(stand: Stand, guest: Guest) -> None:
    stream, sock = stand.from_host(guest)
    stream.write(b"again")
    assert sock.recv(64) == b"again"


def _successor(guest: Guest, machine: Machine) -> Guest:
    """Return the same driver in the memory of another machine."""
    bus = BusDriver(machine.pio, machine.mmio, _SLOT)

    def notify(index: int) -> None:
        bus.pio.write(bus.notify_port(index), 2, index)

    driver = guest.driver.copied(machine.memory.view(0, RAM_SIZE), notify)
    return Guest(machine, driver)


def test_a_clone_has_connections_of_its_own(stand: Stand) -> None:
    """A clone's guest learns that its connections are gone; the source's live on."""
    guest = stand.guest()
    stream, sock = stand.from_host(guest)
    guest.machine.pause()
    ends = os.pipe()
    pid = clone.fork(guest.machine)
    if pid == 0:
        try:
            guest.machine.resume()
            guest.driver.offer_event()
            guest.wait(lambda: guest.driver.events() == [0])
            guest.driver.offer_event()  # it has handled the event
            sock.close()
            _works(stand, guest)
            guest.machine.pause()
            os.write(ends[1], b"works")
        finally:
            os._exit(0)
    os.close(ends[1])
    assert os.waitpid(pid, 0)[1] == 0
    with os.fdopen(ends[0], "rb") as said:
        assert said.read() == b"works"
    guest.machine.resume()
    stream.write(b"still")
    assert sock.recv(64) == b"still"
    sock.send(b"both ways")
    assert guest.packet().data == b"both ways"
    guest.machine.pause()


def _exchange_confined() -> None:
    """Do the work of a VM's process of the daemon, under its filter."""
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, ExitStack() as stack:
        stand = Stand(vmm, stack, [], pairs=[socket.socketpair() for _ in range(4)])
        confine(CONFINEMENTS[Kind.VM], None)
        guest = stand.guest()
        stream, sock = stand.from_host(guest)
        stream.write(b"from the guest")
        assert sock.recv(64) == b"from the guest"
        sock.send(b"to the guest")
        assert guest.packet().data == b"to the guest"
        sock.shutdown(socket.SHUT_WR)
        assert guest.packet().header.flags == Shutdown.SEND
        stream.shut(Shutdown.BOTH)
        assert sock.recv(1) == b""
        assert guest.packet().op == Op.RST
        other, peer = stand.from_host(guest)
        other.write(bytes(0x8000))
        peer.close()
        guest.machine.pause()


def test_in_a_confined_process() -> None:
    """The device needs no system call that a VM's process lacks."""
    pid = os.fork()
    if pid == 0:
        try:
            _exchange_confined()
            os._exit(0)
        except BaseException as err:  # noqa: BLE001 - nothing may go up from here
            os.write(2, f"{type(err).__name__}: {err}\n".encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# vmctl run


def _client(path: Path, line: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE_S)
    sock.connect(str(path))
    sock.send(line)
    return sock


_LINES = (
    *(b"CONNECT 22\n", b"connect 4294967294\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n"),
    *(b"CONNECT 4294967295\n", b"CONNECT 1 2\n", b"HELLO 22\n", b"\n", b"CONNECT " + b"1" * 64),
)


def _is_sent_away(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:  # it has sent more than was read
        return True


def test_a_guest_without_a_driver(tmp_path: Path) -> None:
    """A client that sends nonsense is disconnected; the VM runs on, and cleans up at its end."""
    path = tmp_path / "vsock"
    arguments = vmctl_run("--selftest", "--timeout", "60", "--vsock", f"{path},cid=7")
    with ConsoleProcess(arguments) as vm:
        vm.expect("selftest: ready", _READY_S)
        assert path.stat().st_mode & 0o777 == 0o600
        for line in _LINES:
            with _client(path, line) as client:
                assert _is_sent_away(client)
        with _client(path, b"CONN") as client:
            vm.send("p")
            assert vm.wait() == 0
            assert _is_sent_away(client)
        assert vm.errors == b""
    assert not path.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "invalid vsock: : a socket's path comes first"),
        (",cid=3", "invalid vsock: ,cid=3: a socket's path comes first"),
        ("v,cid=2", "invalid vsock: v,cid=2: the cid is 3 to 4294967294"),
        ("v,cid=x", "invalid vsock: v,cid=x: the cid is 3 to 4294967294"),
        ("v,cid=4294967295", "invalid vsock: v,cid=4294967295: the cid is 3 to 4294967294"),
        ("{}/none/v", "{}/none/v: No such file or directory"),
        ("{}/file", "{}/file: is there, and no socket"),
        ("{}/served", "{}/served: another VM serves it"),
        ("{}/" + "x" * 120, "{}/" + "x" * 120 + ": AF_UNIX path too long"),
    ],
)
def test_what_is_refused(tmp_path: Path, value: str, message: str) -> None:
    """A wrong option is reported in one line."""
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as served:
        served.bind(str(tmp_path / "served"))
        served.listen()
        argument = value.replace("{}", str(tmp_path))
        done = _refused("--selftest", "--vsock", argument)
    assert done == f"vmctl: {message.replace('{}', str(tmp_path))}\n"
    assert (tmp_path / "file").exists()
    assert (tmp_path / "served").exists()


def _refused(*arguments: str) -> str:
    """Run a command that must fail; returns its message."""
    done = subprocess.run(
        [VMCTL, "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr
