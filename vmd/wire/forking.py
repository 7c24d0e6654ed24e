"""What vmm and the zygote say to each other: which processes to fork, and to end."""

from vmd.wire.blank import Preparation, Role
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import Internal, SetVerbosity


class Fork(Internal, frozen=True, kw_only=True):
    """Fork a process, which has the connection whose descriptor comes along, and waits on it."""

    role: Role
    preparation: Preparation


class Forked(Internal, frozen=True, kw_only=True):
    """There is such a process, and it is a child of vmm."""

    pid: int


class ForkFailed(Internal, frozen=True, kw_only=True):
    """There is none; `message` is one line."""

    message: str


class Serving(Internal, frozen=True, kw_only=True):
    """The zygote is ready to fork, and is this process; said once, first."""

    pid: int


class EndProcess(Internal, frozen=True, kw_only=True):
    """Kill the process whose pidfd comes along: only those that forked it have that right."""


VmmToZygote = Fork | EndProcess | SetVerbosity
ZygoteToVmm = Serving | Forked | ForkFailed

VMM_AND_ZYGOTE: Wire[VmmToZygote, ZygoteToVmm] = Wire(ZygoteToVmm, WireEncoding.MSGPACK)
ZYGOTE_AND_VMM: Wire[ZygoteToVmm, VmmToZygote] = Wire(VmmToZygote, WireEncoding.MSGPACK)
