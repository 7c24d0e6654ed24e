"""Clients' requests about ports of guests, for `messages`, and the answer."""

from typing import Annotated

import msgspec

from vmd.wire.parts import Answer, VmRequest
from vmm_kvm.limits import GUEST_PORT_MAX


class Connect(VmRequest, frozen=True, kw_only=True):
    """Connect to a port of a VM's guest, by its vsock device; answered by `connected`."""

    port: Annotated[int, msgspec.Meta(ge=0, le=GUEST_PORT_MAX)]


class Debug(VmRequest, frozen=True, kw_only=True):
    """Debug a VM's guest; answered by `connected`, with a stream for GDB's remote protocol.

    The guest is stopped until the debugger lets it continue, or the stream ends. One debugger at a
    time: the stream of a second one ends.
    """


class Connected(Answer, frozen=True, kw_only=True):
    """A stream to a port of the guest, or for a debugger: a SOCK_STREAM socket.

    A port's stream begins with a line, `OK ` and a number, once the guest has accepted. If the
    guest refuses, has no driver yet, or has too many connections, the stream ends instead.
    """

    id: int
    stream: int = 0
    """Index of the stream's descriptor."""
