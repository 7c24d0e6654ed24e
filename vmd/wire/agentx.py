"""Messages between the parent and the agentx process: VMs for the host's SNMP agent."""

from typing import Annotated

import msgspec

from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import SetVerbosity
from vmd.wire.messages import VmInfo
from vmd.wire.parts import TEXT_MAX, Internal, Part


class VmRow(Part, frozen=True, kw_only=True):
    """A VM in the table."""

    vm: VmInfo
    is_enabled: bool
    """The daemon starts it by itself."""


class SetSession(Internal, frozen=True, kw_only=True):
    """Register as a sub-agent in this context, the default one if empty.

    `path`, for messages, is the master agent's socket; empty: register nowhere.
    """

    path: str
    context: str


class Connected(Internal, frozen=True, kw_only=True):
    """The connection to the master agent comes along."""


class NotConnected(Internal, frozen=True, kw_only=True):
    """There is none; `message` is one line."""

    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]


class VmTable(Internal, frozen=True, kw_only=True):
    """The VMs, as many as fit into a message; another follows if there are more."""

    rows: tuple[VmRow, ...]
    has_more: bool


class Connect(Internal, frozen=True, kw_only=True):
    """Connect with the master agent: answered by Connected or NotConnected."""


class AskVms(Internal, frozen=True, kw_only=True):
    """Ask for the VMs, one question at a time: answered by VmTable."""


ParentToAgentx = SetSession | Connected | NotConnected | VmTable | SetVerbosity
AgentxToParent = Connect | AskVms

PARENT_AND_AGENTX: Wire[ParentToAgentx, AgentxToParent] = Wire(AgentxToParent, WireEncoding.MSGPACK)
AGENTX_AND_PARENT: Wire[AgentxToParent, ParentToAgentx] = Wire(ParentToAgentx, WireEncoding.MSGPACK)
