"""Messages between vmm and the zygote: making and killing processes."""

from vmd.wire.blank import Preparation, Role
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import SetVerbosity
from vmd.wire.parts import Internal


class Fork(Internal, frozen=True, kw_only=True):
    """Fork a process, which has the connection whose descriptor comes along, and waits on it.

    It sends `Forked` itself; if it could not be made, the zygote sends `ForkFailed`.
    """

    order: int
    """A number, for the answer."""
    role: Role
    preparation: Preparation
    uid: int = 0
    """The user that it becomes, and its group; 0 if it keeps the zygote's."""


class Forked(Internal, frozen=True, kw_only=True):
    """The sender of this, whom the kernel identifies, exists, and is a child of vmm."""

    order: int


class ForkFailed(Internal, frozen=True, kw_only=True):
    """There is none; `message` is one line."""

    order: int
    message: str


class Serving(Internal, frozen=True, kw_only=True):
    """The sender of this is the zygote, ready to fork; sent once, first."""


class EndProcess(Internal, frozen=True, kw_only=True):
    """Kill the process whose pidfd comes along: only the zygote, which has made it, may.

    Answered by `ProcessEnded`.
    """

    order: int
    uid: int = 0
    """As the process was forked with."""


class ProcessEnded(Internal, frozen=True, kw_only=True):
    """The process was sent the signal, or had ended."""

    order: int


VmmToZygote = Fork | EndProcess | SetVerbosity
ZygoteToVmm = Serving | Forked | ForkFailed | ProcessEnded

VMM_AND_ZYGOTE: Wire[VmmToZygote, ZygoteToVmm] = Wire(ZygoteToVmm, WireEncoding.MSGPACK)
ZYGOTE_AND_VMM: Wire[ZygoteToVmm, VmmToZygote] = Wire(VmmToZygote, WireEncoding.MSGPACK)
