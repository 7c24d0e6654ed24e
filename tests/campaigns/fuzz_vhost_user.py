"""Campaign: random and malformed front-ends against a vhost-user server.

COUNT conversations, each over a connection of its own, most of which start like a good one so
that rings run while nonsense arrives: mutated payloads and headers, requests in any order, wrong,
missing and strange descriptors, rings and chains full of random bytes, messages in pieces, and
ends in the middle. After each the server must serve an honest driver; it may neither end, nor
print more than a line for each conversation, nor grow, nor keep a descriptor.

Any deviation is printed, and the exit status is 1. The same --seed gives the same conversations.
"""

from __future__ import annotations

import argparse
import array
import os
import random
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.unit.virtio.vhost_user.rig import (  # noqa: E402
    GPA,
    MEMORY_SIZE,
    USER,
    VERSION_1,
    Driver,
    driver,
)
from vmm_kvm.errors import VmmError  # noqa: E402
from vmm_kvm.virtio.vhost_user.client import Client  # noqa: E402
from vmm_kvm.virtio.vhost_user.messages import (  # noqa: E402
    FEATURE_PROTOCOL_FEATURES,
    PAYLOAD_MAX,
    ConfigAccess,
    Header,
    MemoryRegion,
    Request,
    VringAddress,
    VringState,
    pack_region,
    pack_regions,
    pack_u64,
)

IMAGE_SIZE = 1 << 20
MESSAGES_MAX = 40
TIMEOUT_S = 20
# Resident memory over the whole campaign; the server itself takes about 25 MiB.
GROWTH_MAX = 16 << 20
WARM_UP = 50
# A line for the end of the connection, and one for each ring that the driver broke.
LINES_MAX = 9
_EVENT_IDX, _INDIRECT = 1 << 29, 1 << 28
_EDGES32 = (0, 1, 2, 3, 7, 8, 255, 256, 257, 4096, 0x8000, 0xFFFF, 0x10000, 2**31, 2**32 - 1)
_EDGES64 = (*_EDGES32, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1, GPA, USER, USER + MEMORY_SIZE)
_RINGS_SIZE = 0x6000


class FrontEnd:
    """A random front-end: `chance` alone decides its messages; a context manager."""

    def __init__(self, chance: random.Random, guest: Driver, connection: socket.socket) -> None:
        """Speak over `connection`, with the memory and eventfds of `guest`."""
        self._chance = chance
        self._guest = guest
        self._socket = connection
        connection.settimeout(TIMEOUT_S)
        read_end, write_end = os.pipe()
        self._strange = [
            *(read_end, write_end, os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY)),
            *(os.dup(connection.fileno()), os.eventfd(3, os.EFD_CLOEXEC)),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._strange:
            os.close(fd)

    def talk(self) -> None:
        """Send all messages, or as many as the server reads."""
        chance = self._chance
        messages = self._honest() if chance.random() < 0.85 else []
        messages += [self._message() for _ in range(chance.randrange(MESSAGES_MAX))]
        try:
            for request, payload, fds in messages:
                self._send(request, payload, fds)
                self._disturb()
                self._drain()
            if chance.random() < 0.5:
                self._socket.shutdown(socket.SHUT_WR)
                while self._socket.recv(4096):
                    pass
        except OSError:  # the server has ended the conversation, which is its right
            return

    def _honest(self) -> list[tuple[int, bytes, list[int]]]:
        """Return a front-end's messages that start its rings."""
        guest = self._guest
        features = VERSION_1 | self._chance.choice((0, _EVENT_IDX, _EVENT_IDX | _INDIRECT))
        said: list[tuple[int, bytes, list[int]]] = [
            (Request.SET_PROTOCOL_FEATURES, pack_u64(self._chance.choice((0x1A209, 0x9, 0))), []),
            (Request.SET_FEATURES, pack_u64(features | FEATURE_PROTOCOL_FEATURES), []),
            (Request.SET_MEM_TABLE, pack_regions([guest.region]), [guest.fd]),
        ]
        for ring in range(2):
            said += [
                (Request.SET_VRING_NUM, VringState(ring, 8).pack(), []),
                (Request.SET_VRING_BASE, VringState(ring, 0).pack(), []),
                (Request.SET_VRING_ADDR, guest.address(ring).pack(), []),
                (Request.SET_VRING_CALL, pack_u64(ring), [guest.call[ring]]),
                (Request.SET_VRING_ERR, pack_u64(ring), [guest.error[ring]]),
                (Request.SET_VRING_KICK, pack_u64(ring), [guest.kick[ring]]),
                (Request.SET_VRING_ENABLE, VringState(ring, 1).pack(), []),
            ]
        return said

    def _number(self, edges: Sequence[int], bits: int) -> int:
        if self._chance.random() < 0.7:
            return self._chance.choice(edges)
        return self._chance.getrandbits(self._chance.randrange(bits) + 1)

    def _u32(self) -> int:
        return self._number(_EDGES32, 32)

    def _u64(self) -> int:
        return self._number(_EDGES64, 64)

    def _ring(self) -> int:
        return self._chance.randrange(2) if self._chance.random() < 0.8 else self._u32()

    def _region(self) -> MemoryRegion:
        region = self._guest.region
        if self._chance.random() < 0.5:
            field = self._chance.choice(MemoryRegion._fields)
            region = region._replace(**{field: self._u64()})
        return region

    def _address(self) -> VringAddress:
        address = self._guest.address(self._chance.randrange(2))
        if self._chance.random() < 0.3:
            address = address._replace(ring=self._ring())
        for field in ("descriptor", "used", "available", "flags"):
            if self._chance.random() < 0.15:
                value = self._u32() if field == "flags" else self._u64()
                address = address._replace(**{field: value})
        return address

    def _payload(self, request: int) -> bytes:
        """Return a payload that is of the right form more often than not."""
        chance = self._chance
        match request:
            case Request.SET_MEM_TABLE:
                return pack_regions([self._region() for _ in range(chance.randrange(9))])
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                return pack_region(self._region())
            case Request.SET_VRING_ADDR:
                return self._address().pack()
            case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.GET_VRING_BASE:
                return VringState(self._ring(), self._u32()).pack()
            case Request.SET_VRING_ENABLE:
                return VringState(self._ring(), chance.randrange(2)).pack()
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                return pack_u64(self._ring() | chance.choice((0, 0, 0, 1 << 8)))
            case Request.GET_CONFIG | Request.SET_CONFIG:
                data = chance.randbytes(chance.choice((0, 1, 8, 60, 256)))
                return ConfigAccess(self._u32(), chance.randrange(2), data).pack()
            case Request.SET_FEATURES | Request.SET_PROTOCOL_FEATURES | Request.SET_STATUS:
                return pack_u64(self._u64())
            case _:
                return b""

    def _message(self) -> tuple[int, bytes, list[int]]:
        chance = self._chance
        request = chance.choice(list(Request)) if chance.random() < 0.97 else self._u32()
        payload = bytearray(self._payload(request))
        if payload and chance.random() < 0.1:
            payload[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.03:
            payload += chance.randbytes(chance.randrange(64))
        fds: list[int] = []
        guest = self._guest
        wanted = {
            Request.SET_VRING_KICK: 1,
            Request.SET_VRING_CALL: 1,
            Request.SET_VRING_ERR: 1,
            Request.ADD_MEM_REG: 1,
            Request.SET_MEM_TABLE: payload[0] if payload else 0,
        }
        count = wanted.get(Request(request), 0) if request in set(Request) else 0
        if chance.random() < 0.05:
            count = chance.randrange(12)
        is_memory = request in {Request.SET_MEM_TABLE, Request.ADD_MEM_REG}
        for _ in range(min(count, 12)):
            usual = guest.fd if is_memory else chance.choice([*guest.kick, *guest.call])
            fds.append(usual if chance.random() < 0.85 else chance.choice(self._strange))
        return request, bytes(payload), fds

    def _send(self, request: int, payload: bytes, fds: list[int]) -> None:
        chance = self._chance
        size = len(payload)
        flags = 1 | chance.choice((0, 8))
        if chance.random() < 0.01:
            size = self._u32()
        if chance.random() < 0.01:
            flags = self._u32()
        data = Header(request, flags, size).pack() + payload[:PAYLOAD_MAX]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if chance.random() < 0.1 and len(data) > 1:
            cut = chance.randrange(1, len(data))
            self._socket.sendmsg([data[:cut]], ancillary, socket.MSG_NOSIGNAL)
            data, ancillary = data[cut:], []
        self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def _disturb(self) -> None:
        """Be a driver: fill rings with requests, or with nonsense, and notify."""
        chance, guest = self._chance, self._guest
        for _ in range(chance.choice((0, 0, 1, 4))):
            if chance.random() < 0.7:
                header = chance.choice((0, 1, 4, 8, 11, 13, self._u32())).to_bytes(8, "little")
                header += self._u64().to_bytes(8, "little")
                gpa = self._u64() if chance.random() < 0.05 else None
                data = header + chance.randbytes(chance.choice((0, 16, 512)))
                room = chance.choice((1, 2, 21, 513, 4097))
                guest.offer(data, chance.randrange(2), room=room, gpa=gpa)
            else:
                at = chance.randrange(_RINGS_SIZE)
                junk = chance.randbytes(chance.choice((1, 2, 8, 64)))
                guest.memory[at : at + len(junk)] = junk
            os.eventfd_write(chance.choice(guest.kick), 1)

    def _drain(self) -> None:
        """Read replies, so that the server never has to wait for its reader."""
        while select.select([self._socket], [], [], 0)[0]:
            if not self._socket.recv(4096):
                raise ConnectionResetError


class Server:
    """A vmm-blk with two queues; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Start it in `folder`, with an image of 1 MiB, and wait until it listens."""
        self.path = folder / "disk.sock"
        image = folder / "disk.img"
        image.write_bytes(bytes(IMAGE_SIZE))
        self._errors = folder / "errors"
        arguments = ["--queues", "2", "--format", "raw", "--socket", str(self.path), str(image)]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmm_kvm.commands.vmm_blk", *arguments],
                cwd=ROOT,
                stderr=errors,
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.connect().close()
            except OSError:
                if time.monotonic() > deadline:
                    self.__exit__()
                    raise
                time.sleep(0.02)
            else:
                return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def connect(self) -> socket.socket:
        """Return a connection to it, which may be in the backlog for a while."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self.path))
        except BaseException:
            connection.close()
            raise
        return connection

    def descriptors(self) -> int:
        """Return the number of its open descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident(self) -> int:
        """Return its resident memory that is not shared, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def said(self) -> list[str]:
        """Return the lines on its standard error."""
        return self._errors.read_text(errors="replace").splitlines()


def check(server: Server) -> str | None:
    """Be an honest driver; return the server's fault."""
    try:
        with driver() as guest, Client(server.connect()) as client:
            guest.start(client)
            answer = guest.request(bytes(16), size=513)
            return None if answer[-1:] == b"\0" else f"it answers {answer[-1:]!r}"
    except (VmmError, OSError, AssertionError) as err:
        return f"it does not serve any more: {type(err).__name__}: {err}"


def settled_descriptors(server: Server, expected: int) -> int:
    """Return the number of the server's descriptors, once it has noticed that we disconnected."""
    deadline = time.monotonic() + TIMEOUT_S
    while (count := server.descriptors()) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def campaign(count: int, seed: int) -> list[str]:
    """Hold `count` conversations; return the deviations, a line each."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server:
        wrong = check(server)
        if wrong is not None:
            return [f"at the start: {wrong}"]
        with Client(server.connect()):  # an idle connection
            descriptors = server.descriptors() - 1
        resident = 0
        for number in range(count):
            if number == min(WARM_UP, count - 1):
                resident = server.resident()
            own = random.Random(chance.getrandbits(64))
            with (
                driver() as guest,
                server.connect() as connection,
                FrontEnd(own, guest, connection) as front_end,
            ):
                front_end.talk()
            wrong = check(server)
            if wrong is not None or server.process.poll() is not None:
                last = server.said()[-20:]
                return [f"conversation {number}: {wrong or 'it ended'}", *last]
        deviations = []
        left = settled_descriptors(server, descriptors)
        if left != descriptors:
            deviations.append(f"descriptors: {descriptors} before, {left} after")
        grown = server.resident() - resident
        if grown > GROWTH_MAX:
            deviations.append(f"memory has grown by {grown >> 10} KiB")
        said = server.said()
        if len(said) > LINES_MAX * count:
            deviations.append(f"{len(said)} lines on standard error")
        strange = [line for line in said if not line.startswith("vmm-blk: ")]
        return deviations + [f"it says: {line}" for line in strange[:20]]


def main(arguments: Sequence[str]) -> int:
    """Run the campaign and print its summary."""
    parser = argparse.ArgumentParser(
        prog="fuzz_vhost_user", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="conversations")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    deviations = campaign(given.count, given.seed)
    for line in deviations:
        print(line, flush=True)
    taken = time.monotonic() - begun
    print(f"{given.count:,} conversations in {taken:.0f} s: {len(deviations)} deviated")
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
