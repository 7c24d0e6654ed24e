"""How long a process may leave the channel to it full."""

from collections.abc import Callable

from vmd.wire.channel import Loop


class Patience:
    """A source of a channel that runs out of patience while the channel stays full."""

    def __init__(self, loop: Loop, patience_ns: int | None, on_loss: Callable[[], None]) -> None:
        """Call `on_loss` when the channel has been full for `patience_ns`, if that is not None."""
        self._loop = loop
        self._patience_ns = patience_ns
        self._timer = loop.timer(on_loss)

    def hold(self, _reason: object) -> None:
        """Begin to wait: the channel is full."""
        if self._patience_ns is not None:
            self._timer.arm(self._loop.monotonic_ns() + self._patience_ns)

    def release(self, _reason: object) -> None:
        """Wait no more."""
        self._timer.cancel()
