"""What is noted of requests, for `vmctl log`."""

from __future__ import annotations

import os

import pytest

from vmd.parent.request_log import RequestLog
from vmd.wire.messages import ErrorCode, Failed, Start


@pytest.mark.parametrize("code", [code for code in ErrorCode if code is not ErrorCode.EPERM])
@pytest.mark.parametrize("message", ["", "the disk is gone"])
def test_a_failure_is_told_in_words(code: ErrorCode, message: str) -> None:
    """The reason, or what the code means; no name of a constant."""
    noted: list[str] = []
    log = RequestLog(lambda _id, _name: None, lambda _id, text: noted.append(text))
    log.asked(1, os.getuid(), Start(name="one"))
    log.answered(1, Failed(code=code, message=message))
    (text,) = noted
    verb, _, why = text.partition(" failed: ")
    assert verb.startswith("start by ")
    assert why == message if message else why not in {"", *ErrorCode.__members__}
