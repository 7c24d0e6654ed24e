"""Campaign: broken AgentX PDUs from a faulty master agent.

Each PDU is a right one with bytes changed, cut off, doubled or added. The process may answer,
refuse or disconnect; it connects again each time. Every so often the campaign asks for the number
of VMs, and the process must answer.

The first deviation is printed, and the exit status is 1. The same --seed sends the same PDUs.
"""

from __future__ import annotations

import argparse
import logging
import random
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.unit.vmd import master_agent as master  # noqa: E402
from tests.unit.vmd.test_agentx import ENTRY, ROWS, SESSION, Rig  # noqa: E402
from vmd.agentx.mib import REGION  # noqa: E402
from vmd.wire.agentx import AskVms, VmTable  # noqa: E402
from vmm_kvm.loop import EventLoop  # noqa: E402

_RANGE = master.oid((*ENTRY, 2)) + master.oid((*ENTRY, 9, 4))
UNITS = (
    master.unit(master.GET, master.oid((*ENTRY, 2, 3)) + master.oid(()), session=SESSION),
    master.unit(master.GET_NEXT, _RANGE * 3, session=SESSION),
    master.unit(master.GET_BULK, struct.pack(">HH", 1, 9) + _RANGE * 4, session=SESSION),
    master.unit(master.TEST_SET, _RANGE, session=SESSION),
    master.unit(master.RESPONSE, bytes(8), session=SESSION),
    master.unit(master.CLOSE, bytes(4), session=SESSION),
)
NUMBER = (*REGION, 1, 2, 0)
_CHECKED_IN = 50


def broken(unit: bytes, chance: random.Random) -> bytes:
    """Return the PDU with a fault, its size mended half of the time."""
    data = bytearray(unit)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(6):
            case 0 | 1 | 2 if data:
                data[at] = chance.choice((0, 1, 0x7F, 255, chance.randrange(256)))
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[at : at + 4 * chance.randrange(9)]
            case _:
                data += chance.randbytes(4 * chance.randrange(9))
    if len(data) >= 20 and chance.random() < 0.5:
        data[16:20] = struct.pack(">I", len(data) - 20)
    return bytes(data)


class Campaign:
    """Sends PDUs to a process, and counts its sessions."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.sessions = 0
        self.told = 0

    def send(self, data: bytes) -> None:
        """Send a PDU in a session; answer the process's questions to its parent meanwhile."""
        if not self.sessions:
            self.rig.open()
            self.sessions = 1
        elif self.rig.has_left:
            self.rig.reopen()
            self.sessions += 1
        self.rig.send(data)
        self.rig.turn()
        while self.told < len(self.rig.parent.of(AskVms)):
            self.told += 1
            self.rig.parent.say(VmTable(rows=ROWS, has_more=False))
            self.rig.turn()


def campaign(count: int, seed: int) -> tuple[int, str | None]:
    """Send `count` PDUs; returns the number of sessions, and the first deviation."""
    chance = random.Random(seed)
    with EventLoop() as loop, closing(Rig(loop, retry_s=0)) as rig:
        run = Campaign(rig)
        for number in range(count):
            data = broken(chance.choice(UNITS), chance)
            try:
                run.send(data)
                if number % _CHECKED_IN == 0:
                    # A PDU that was cut off would take this one for its end.
                    rig.leave()
                    run.send(b"")
                    run.told += 1
                    get = master.oid(NUMBER) + master.oid(())
                    error, found = rig.ask(master.GET, get)
                    if (error, found) != (0, [(NUMBER, master.INTEGER, len(ROWS))]):
                        return run.sessions, f"unit {number}: {error} {found}"
            except Exception as err:  # noqa: BLE001 - whatever it is, it is what is looked for
                return run.sessions, f"unit {number}: {data.hex()}: {err!r}"
    return run.sessions, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="units (100000)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    logging.disable()  # each refusal is logged
    begin = time.monotonic()
    sessions, deviation = campaign(given.count, given.seed)
    elapsed = time.monotonic() - begin
    print(f"seed {given.seed}: {given.count} units in {elapsed:.0f} s, {sessions} sessions")
    if deviation:
        print(deviation)
    return 1 if deviation else 0


if __name__ == "__main__":
    sys.exit(main())
