"""Fuzz target: messages between the daemon's processes, as packets with descriptors.

Packets come over a real socket to the end of each kind of process. An invalid message ends the
channel, with one line; a valid one decodes to the same when it is sent on. Each descriptor is
closed once, in any case.
"""

from __future__ import annotations

import array
import os
import socket
from typing import NamedTuple

import msgspec

from tests.fuzz.inputs import Input, check_line
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import InterfaceConfig, SwitchConfig
from vmd.wire import device, files, forking, internal, local
from vmd.wire.ancillary import FDS_MAX
from vmd.wire.blank import JoinCgroup, Preparation, Role, SpareCgroup
from vmd.wire.channel import (
    Channel,
    ChannelClosedError,
    DescriptorsLostError,
    MalformedError,
)
from vmd.wire.encoding import Wire
from vmd.wire.messages import Done, ErrorCode, Event, EventKind, Start
from vmd.wire.parts import Statistics

PACKETS_MAX = 8
PACKET_MAX = 4096


class End(NamedTuple):
    """One process's end of a channel: the messages that it takes, and their encoder."""

    takes: Wire[object, object]
    writes: Wire[object, object]


def _ends() -> tuple[End, ...]:
    named = {**vars(internal), **vars(files), **vars(device), **vars(forking)}
    names = [name for name, value in named.items() if isinstance(value, Wire)]
    # X_AND_Y is X's end, whose messages Y writes.
    pairs = [(name, "_AND_".join(reversed(name.split("_AND_")))) for name in sorted(names)]
    return tuple(End(named[one], named[other]) for one, other in pairs)


ENDS = _ends()


def run(data: bytes) -> None:
    """Send packets to one end."""
    given = Input(data)
    end = given.choice(ENDS)
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with Channel(ours, end.takes) as channel:
            for _ in range(PACKETS_MAX):
                if given.is_over:
                    break
                count, size = given.number(1), given.number(2) % PACKET_MAX
                fds = array.array("i", [write_end] * (count % (FDS_MAX + 8)))
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
                theirs.sendmsg([given.piece(size)], ancillary)
                if not _receive(end, channel, given.number(1)):
                    break
    finally:
        theirs.close()
        os.close(write_end)
        # The other end is closed.
        assert os.read(read_end, 1) == b""
        os.close(read_end)


def _receive(end: End, channel: Channel[object, object], index: int) -> bool:
    """Take a packet; False if the channel is over."""
    try:
        received = channel.receive()
    except (MalformedError, ChannelClosedError) as err:
        check_line(str(err))
        return False
    with received.fds as fds:
        try:
            if index & 0x80:
                fds.spread(range(len(fds))[::-1])
            os.close(fds.take(index & 0x7F))
        except (MalformedError, DescriptorsLostError) as err:
            check_line(str(err))
    assert end.takes.decode(end.writes.encode(received.message)) == received.message
    return True


def _examples() -> list[object]:
    config = InterfaceConfig(lladdr="fe:e1:bb:d1:00:01", switch="s", tap="tap1", mtu=9000)
    disk = internal.DiskSpec(
        option=DiskOption(DiskKind.QCOW2, "/d", serial="x"), chain=(1, 2), formats=(DiskKind.RAW,)
    )
    nic = internal.NicSpec(config=config, name="tap1", taps=(3,), vhosts=(4,))
    spec = internal.VmSpec(
        id=1,
        name="web",
        memory=1 << 28,
        cpus=2,
        boot=0,
        boot_path="/k",
        tty=5,
        ring=6,
        disks=(disk,),
        interfaces=(nic,),
    )
    addresses = internal.LocalAddresses(host4="10.0.0.1", guest4="10.0.0.2", host_lladdr="02::1")
    tap = internal.TapSpec(config=config, alias="a", bridge="b", local=addresses, queues=(0,))
    wanted = files.WantedFile(use=files.FileUse.DISK, path="/d", passed=(0,), writes=True)
    return [
        internal.ClientCame(client=1),
        internal.ClientRequest(client=1, request=Start(name="web", memory=1 << 28, kernel=0)),
        internal.ClientGone(client=1),
        internal.ClientAnswer(client=1, answer=Done(serial=1, id=2)),
        internal.Considered(client=1),
        internal.Happened(event=Event(kind=EventKind.STARTED, id=1, name="web", at=1.5)),
        internal.SetVerbosity(level=2),
        internal.Configure(
            mark="m", table="t", switches=(SwitchConfig("s", "bridge0"),), nat4="10.0.0.0/8"
        ),
        internal.MakeTaps(id=1, taps=(tap,)),
        internal.TapsMade(id=1, taps=(internal.MadeTap(name="t", index=3),), is_filtered=True),
        local.ServeLocal(id=1, interface="t", lladdr="02::2", addresses=addresses, dns=(1, 2)),
        internal.LaunchVm(spec=spec),
        internal.Begin(spec=spec, places=(0, 1, 2), verbosity=1),
        internal.ToVm(id=1, command=internal.ConnectVm(port=22)),
        internal.ToVm(id=1, command=internal.DebugVm()),
        internal.ToVm(id=1, command=internal.SetLinks(are_up=(True, False))),
        internal.FromVm(
            id=1, report=internal.VmStatistics(statistics=Statistics(cpu_ns=5), memory_used=7)
        ),
        internal.VmStatistics(statistics=Statistics(disk_read=1), memory_used=7),
        internal.VmEnding(reason=internal.EndReason.FAILED, message="no"),
        internal.VmExited(id=1, pid=5, status=-9),
        SpareCgroup(number=1),
        JoinCgroup(number=1),
        forking.Fork(order=1, role=Role.VM, preparation=Preparation.REHEARSED),
        forking.Forked(order=1),
        device.BeginDisk(disk=disk, vm="web", verbosity=1),
        device.BeginNic(nic=nic, vm="web", verbosity=1),
        files.OpenFiles(files=(wanted,)),
        files.FilesOpened(files=(files.FoundFile(chain=(0,), formats=(DiskKind.RAW,)),)),
        files.OpeningFailed(code=ErrorCode.EIO, message="no"),
    ]


def seeds() -> list[bytes]:
    """Return each message to each end that takes it, alone and twice, with descriptors."""
    found = []
    for message in _examples():
        data = msgspec.msgpack.encode(message)
        packet = b"\x02" + len(data).to_bytes(2, "little") + data + b"\x01"
        for number, end in enumerate(ENDS):
            try:
                end.takes.decode(data)
            except ValueError:
                continue
            found.append(bytes([number]) + packet)
    return [*found, bytes([0, 65, 1, 0, 0xC0, 0])]
