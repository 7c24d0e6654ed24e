"""How a VM that is cloned is taken down: a part of what `internal` has, between parent and VM.

A VM that is captured stands still, and tells what it is in two descriptors of memory: its state,
and its RAM, which clones map.
"""

from typing import Annotated

import msgspec

from vmd.wire.messages import ErrorCode
from vmd.wire.parts import Internal

_TEXT_MAX = 16384


class CaptureVm(Internal, frozen=True, kw_only=True):
    """Hand yourself over in memory, and send `VmCaptured`; then continue, if you ran before."""


class VmCaptured(Internal, frozen=True, kw_only=True):
    """State and RAM come along, in memory that nobody writes to any more; or it is impossible."""

    failure: ErrorCode | None = None
    """Why nothing comes along; None if it does."""
    message: Annotated[str, msgspec.Meta(max_length=_TEXT_MAX)] = ""
