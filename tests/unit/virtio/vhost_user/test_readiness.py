"""Words between a device's process and the one that waits for it."""

import os

import pytest

from vmm_kvm.virtio.vhost_user.readiness import await_ready, tell_failure, tell_ready


def test_what_is_told() -> None:
    """Nothing, a reason of whatever length and letters, or an end without a word."""
    for tell, reason in (
        (tell_ready, None),
        (lambda fd: tell_failure(fd, "no disk"), "no disk"),
        (lambda fd: tell_failure(fd, "\udcff" + "x" * 10_000), "?" + "x" * 4095),
        (os.close, ""),
    ):
        reader, writer = os.pipe()
        tell(writer)
        assert await_ready(reader) == reason
        for fd in reader, writer:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_nobody_waits() -> None:
    """A VM that was ended meanwhile is no fault."""
    for tell, is_heard in ((tell_ready, False), (lambda fd: tell_failure(fd, "x"), None)):
        reader, writer = os.pipe()
        os.close(reader)
        assert tell(writer) is is_heard
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(writer)
