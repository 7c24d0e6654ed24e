"""What becomes of processes that do not read what they are sent, or say what is no message."""

from collections.abc import Callable
from typing import Protocol

from vmd.wire.channel import ChannelError, MalformedError
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

PATIENCE_NS = 10 * NANOSECONDS
"""How long control may leave the channel to it full; it has nothing to do but to read."""


class Patience:
    """Gives up a process whose channel stays full: a source of that channel."""

    def __init__(self, loop: EventLoop, title: str, kill: Callable[[], None]) -> None:
        """Call `kill` when the channel has been full for `PATIENCE_NS`; `title` is for the log."""
        self._loop = loop
        self._title = title
        self._kill = kill
        self._timer = loop.timer(self._give_up)

    def hold(self, _reason: object) -> None:
        """Begin to wait: the channel is full."""
        self._timer.arm(self._loop.monotonic_ns() + PATIENCE_NS)

    def release(self, _reason: object) -> None:
        """Wait no more."""
        self._timer.cancel()

    def _give_up(self) -> None:
        log.error("%s does not read: killed", self._title)
        self._kill()


class _Closable(Protocol):
    def close(self) -> None: ...


def cut(title: str, channel: _Closable, err: ChannelError, kill: Callable[[], None]) -> None:
    """Account for a channel's end: so has its process ended, or it does now."""
    if isinstance(err, MalformedError):
        log.error("%s: %s", title, err)
        channel.close()
        kill()
