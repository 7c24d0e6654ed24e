"""Messages between the parent and the tpm process, which executes a swtpm for each TPM."""

from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import SetVerbosity
from vmd.wire.parts import Internal

DIRECTORY_MODE, FILE_MODE = 0o777, 0o666
"""Of a TPM's secrets: whoever becomes its swtpm can use them, and nobody else can go there."""


class StartTpm(Internal, frozen=True, kw_only=True):
    """Start a swtpm for this VM; answered by `TpmEnded` in the end, also if it cannot start.

    Descriptors come along: the directory of its state, its channels of control and of commands, and
    that for joining a control group, if there is one. It waits for an earlier swtpm of this state.
    """

    number: int
    vm: str
    state: str
    """The name of its state, which only one swtpm uses at a time."""
    uid: int
    """The user that it becomes; 0 for none."""


class TpmEnded(Internal, frozen=True, kw_only=True):
    """A swtpm has ended, and uses its state no more."""

    number: int


ParentToTpm = StartTpm | SetVerbosity
TpmToParent = TpmEnded

PARENT_AND_TPM: Wire[ParentToTpm, TpmToParent] = Wire(TpmToParent, WireEncoding.MSGPACK)
TPM_AND_PARENT: Wire[TpmToParent, ParentToTpm] = Wire(ParentToTpm, WireEncoding.MSGPACK)
