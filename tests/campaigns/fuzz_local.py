"""Campaign: broken DHCP requests and router solicitations of a hostile guest.

Each frame is a right one, of one of several kinds, with bytes changed, cut off, doubled or added,
and its checksums mended half of the time, so that the server reads the contents. The server may
raise nothing; an answer goes to this guest alone, with its one address.

The first deviation is printed, and the exit status is 1. The same --seed sends the same frames.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scapy.layers.dhcp import BOOTP  # noqa: E402
from scapy.layers.l2 import Ether  # noqa: E402

from tests.unit.net.test_dhcp import LEASE, Ask  # noqa: E402
from tests.unit.net.test_router import GUEST, solicitation  # noqa: E402
from vmm_kvm.net.dhcp import CLIENT_PORT, SERVER_PORT, answer  # noqa: E402
from vmm_kvm.net.inet import Udp, udp_frame  # noqa: E402
from vmm_kvm.net.router import is_solicitation  # noqa: E402

FRAMES = (
    Ask().frame(),
    Ask("request", "100.64.1.3", padding=60).frame(),
    Ask("request", "100.64.1.4").frame(),
    Ask("inform", ciaddr="100.64.1.3").frame(),
    Ask(None).frame(),
    solicitation(),
)
_HEADERS = 14 + 20 + 8
_CHECKED_IN = 50  # scapy, which is slow, reads one of so many answers


def broken(frame: bytes, chance: random.Random) -> bytes:
    """Return the frame with a fault."""
    data = bytearray(frame)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(5):
            case 0 | 1 if data:
                data[at] = chance.choice((0, 1, 255, chance.randrange(256)))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at : at + chance.randrange(40)]
            case _:
                data += chance.randbytes(chance.randrange(60))
    return bytes(data)


def mended(frame: bytes) -> bytes:
    """Return the frame's contents in a datagram with right headers."""
    if len(frame) <= _HEADERS:
        return frame
    addresses = (bytes(4), b"\xff" * 4)
    udp = Udp(frame[:6], frame[6:12], *addresses, CLIENT_PORT, SERVER_PORT, frame[_HEADERS:])
    return udp_frame(udp, ttl=64)


def campaign(count: int, seed: int) -> tuple[int, str | None]:
    """Send `count` frames; returns the number of answers, and the first deviation."""
    chance = random.Random(seed)
    answered = 0
    for number in range(count):
        frame = broken(chance.choice(FRAMES), chance)
        if chance.random() < 0.5:
            frame = mended(frame)
        try:
            reply = answer(frame, LEASE, is_summed=chance.random() < 0.5)
            is_solicitation(frame, GUEST)
        except Exception as err:  # noqa: BLE001 - whatever it is, it is what is looked for
            return answered, f"frame {number}: {frame.hex()}: {err!r}"
        if reply is None:
            continue
        answered += 1
        if reply[:12] != LEASE.guest_lladdr + LEASE.host_lladdr:
            return answered, f"frame {number}: answered to {reply[:12].hex()}"
        if answered % _CHECKED_IN == 0:
            address = Ether(reply)[BOOTP].yiaddr
            if address not in {"100.64.1.3", "0.0.0.0"}:
                return answered, f"frame {number}: lends {address}"
    return answered, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300_000, help="frames (300000)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    answered, deviation = campaign(given.count, given.seed)
    elapsed = time.monotonic() - begin
    print(f"seed {given.seed}: {given.count} frames in {elapsed:.0f} s, {answered} answered")
    if deviation:
        print(deviation)
    return 1 if deviation else 0


if __name__ == "__main__":
    sys.exit(main())
