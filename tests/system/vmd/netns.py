"""A network of a test's own: a namespace, and the guest's end of a tap in it.

The host's network is never touched: the daemon runs in the namespace, and so does all that it
makes.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self, TypeVar

from scapy.layers.inet import IP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

TIMEOUT_S = 20.0
_CLONE_NEWNET = 0x40000000
_PIDFD_GETFD = 438
_WHO_HAS = 1
_TUNGETVNETHDRSZ = 0x800454D7

_Value = TypeVar("_Value")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Namespace:
    """A network namespace with a loopback interface that is up; a context manager."""

    def __init__(self) -> None:
        """Make it."""
        # It lives as long as this process does.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n"
        self.pid = self._holder.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    @property
    def prefix(self) -> list[str]:
        """Words that run the following command here."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def run(self, *command: str) -> str:
        """Run a command here, and return its output."""
        done = subprocess.run(
            [*self.prefix, *command], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def within(self, function: Callable[[], _Value]) -> _Value:
        """Call a function here, in a thread of its own; sockets that it makes stay here."""
        found: list[_Value] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                with Path(f"/proc/{self.pid}/ns/net").open("rb") as file:
                    assert _libc.setns(file.fileno(), _CLONE_NEWNET) == 0, "setns"
                found.append(function())
            except BaseException as err:  # noqa: BLE001 - raised again outside
                errors.append(err)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return found[0]

    def connect(self, other: Namespace, here: str, there: str) -> None:
        """Connect it to another namespace, with an address such as `10.0.0.1/24` at each end."""
        ends = f"to{other.pid}", f"to{self.pid}"
        self.run(
            *("ip", "link", "add", ends[0], "type", "veth"),
            *("peer", "name", ends[1], "netns", str(other.pid)),
        )
        for space, end, address in ((self, ends[0], here), (other, ends[1], there)):
            space.run("ip", "addr", "add", address, "dev", end)
            space.run("ip", "link", "set", end, "up")

    def links(self) -> set[str]:
        """Return the names of all interfaces."""
        return set(re.findall(r"^\d+: ([^:@]+)", self.run("ip", "link"), re.MULTILINE))

    def rules(self) -> str:
        """Return all rules of the packet filter."""
        return self.run("nft", "list", "ruleset")

    def state(self) -> tuple[str, str, str]:
        """Return the state in which leftovers would show."""
        links = re.sub(r"\bqdisc \S+|\bstate \S+|@\S+", "", self.run("ip", "link"))
        return links, self.run("ip", "addr"), self.rules()

    def wait_for_links(self, expected: set[str]) -> None:
        """Wait until there are exactly these interfaces."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.links() != expected:
            assert time.monotonic() < deadline, (self.links(), expected)
            time.sleep(0.02)


class TapGuest:
    """The guest behind a tap: it sends and receives frames; a context manager.

    The VM itself must not: the self-test guest has no driver.
    """

    def __init__(self, pid: int, tap: str, lladdr: str, address: str = "") -> None:
        """Take a tap's queue from process `pid`, which has it; with an address, answer ARP."""
        self.lladdr = lladdr
        self.address = address
        self._fd = _queue_of(pid, tap)
        import fcntl  # noqa: PLC0415 - for this alone

        size = fcntl.ioctl(self._fd, _TUNGETVNETHDRSZ, bytes(4))
        self._header = bytes(int.from_bytes(size, "little"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def frame(self, packet: Packet) -> bytes:
        """Return a frame as the tap takes it."""
        return self._header + bytes(packet)

    def write(self, frame: bytes) -> None:
        """Send a frame that `frame` has made."""
        os.write(self._fd, frame)

    def send(self, packet: Packet) -> None:
        """Send a frame."""
        self.write(self.frame(packet))

    def receive(
        self, wanted: Callable[[Packet], bool], timeout_s: float = TIMEOUT_S
    ) -> Packet | None:
        """Return the first wanted frame; None if none arrives in time."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if not poll.poll(left * 1000):
                break
            try:
                frame = Ether(os.read(self._fd, 65536 + len(self._header))[len(self._header) :])
            except BlockingIOError:
                continue
            if self.address and ARP in frame and frame[ARP].op == _WHO_HAS:
                self._tell_address(frame[ARP])
            elif wanted(frame):
                return frame
        return None

    def ask(
        self, packet: Packet, wanted: Callable[[Packet], bool], timeout_s: float = TIMEOUT_S
    ) -> Packet:
        """Send a frame, again and again, until a wanted one arrives."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.send(packet)
            found = self.receive(wanted, 1.0)
            if found is not None:
                return found
        raise AssertionError(f"no answer to {packet.summary()}")

    @contextmanager
    def flooding(self, frame: bytes) -> Iterator[None]:
        """Meanwhile send a frame that `frame` has made, as fast as possible."""
        is_over = threading.Event()

        def body() -> None:
            while not is_over.is_set():
                os.write(self._fd, frame)

        thread = threading.Thread(target=body)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def time_to_answer(self, frame: bytes, mark: bytes, timeout_s: float = TIMEOUT_S) -> float:
        """Send a frame of `frame`; returns the seconds until a frame with `mark` arrives."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        time.sleep(0.01)  # so that questions come at any moment of the other work
        begin = time.monotonic()
        self.write(frame)
        while poll.poll(timeout_s * 1000):
            try:
                if mark in os.read(self._fd, 65536):
                    return time.monotonic() - begin
            except BlockingIOError:
                continue
        raise AssertionError("no answer")

    def to(self, lladdr: str, address: str) -> Packet:
        """Return the beginning of a packet to a neighbour, or by way of it."""
        return Ether(src=self.lladdr, dst=lladdr) / IP(src=self.address, dst=address)

    def find(self, address: str) -> str:
        """Return the Ethernet address of a neighbour."""
        question = Ether(src=self.lladdr, dst="ff:ff:ff:ff:ff:ff") / ARP(
            op="who-has", hwsrc=self.lladdr, psrc=self.address, pdst=address
        )
        reply = self.ask(question, lambda frame: ARP in frame and frame[ARP].psrc == address)
        return str(reply[ARP].hwsrc)

    def _tell_address(self, question: ARP) -> None:
        reply = ARP(
            op="is-at",
            hwsrc=self.lladdr,
            psrc=self.address,
            hwdst=question.hwsrc,
            pdst=question.psrc,
        )
        if question.pdst == self.address:
            self.send(Ether(src=self.lladdr, dst=question.hwsrc) / reply)


def udp_server(address: str, port: int) -> socket.socket:
    """Return a UDP socket at this address; called within a namespace, of that one."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))
    server.settimeout(TIMEOUT_S)
    return server


def host_of(guest: str) -> str:
    """Return the host's address beside a guest's."""
    return str(IPv4Address(int(IPv4Address(guest)) - 1))


def _queue_of(pid: int, tap: str) -> int:
    """Return a duplicate of a descriptor of another process. Source: pidfd_getfd(2)."""
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        if re.search(rf"^iff:\s+{tap}$", entry.read_text(), re.MULTILINE):
            pidfd = os.pidfd_open(pid)
            try:
                fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0))
            finally:
                os.close(pidfd)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            os.set_inheritable(fd, False)
            return fd
    raise AssertionError(f"process {pid} has no queue of {tap}")
