"""A kick gets a vCPU out of the guest within a second, whatever the guest does.

A Python that repeats an interrupted ioctl(2) by itself (`fcntl.ioctl` does from 3.14 on) never
returns from KVM_RUN: so these tests run on every Python of the matrix.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests import guests
from vmm_kvm.arch.x86.dispatch import dispatch
from vmm_kvm.bus import Bus
from vmm_kvm.kvm.exits import Exit, Interrupted
from vmm_kvm.kvm.ioctl import signal_thread
from vmm_kvm.kvm.vcpu import KICK_SIGNAL, Vcpu, install_kick_signal

pytestmark = pytest.mark.kvm

LIMIT_S = 1.0
_START_S = 10.0
_INSIDE_S = 0.02  # a thread that was about to enter the guest is there by then


@pytest.fixture(autouse=True)
def kick_signal() -> Iterator[None]:
    """The handler that kicks need, for one test."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    yield
    signal.signal(KICK_SIGNAL, before)


def _run(vcpu: Vcpu) -> Exit:
    return vcpu.run()


def _dispatch(vcpu: Vcpu) -> Exit:
    """Run the vCPU as the machine does."""
    vcpu.bind_thread()
    return dispatch(vcpu, Bus(1 << 16), Bus(1 << 32))


class _Thread:
    """A thread that enters the guest once; it does not keep a failed test's process alive."""

    def __init__(self, vcpu: Vcpu, enter: Callable[[Vcpu], Exit]) -> None:
        self.native_id = 0
        self.reason: Exit | None = None
        self._vcpu = vcpu
        self._enter = enter
        self._entering = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._target, daemon=True)
        self._thread.start()
        assert self._entering.wait(_START_S)

    def _target(self) -> None:
        self.native_id = threading.get_native_id()
        self._entering.set()
        self.reason = self._enter(self._vcpu)
        self._left.set()

    def wait_inside(self) -> None:
        """Wait until the guest has run for a while, or the vCPU sleeps in it."""
        self._left.wait(_INSIDE_S)
        assert self.reason is None

    def assert_leaves(self) -> None:
        """Check that the vCPU is interrupted in time."""
        asked = time.monotonic()
        assert self._left.wait(LIMIT_S), "the vCPU is still in the guest"
        assert time.monotonic() - asked < LIMIT_S
        self._thread.join(_START_S)
        assert isinstance(self.reason, Interrupted)


_WAYS = pytest.mark.parametrize("enter", [_run, _dispatch])


@_WAYS
@pytest.mark.parametrize("irqchip", [False, True])
def test_spinning(enter: Callable[[Vcpu], Exit], irqchip: bool) -> None:
    """A kick ends a guest that never leaves by itself."""
    with guests.guest(guests.SPIN, irqchip=irqchip) as g:
        thread = _Thread(g.vcpu, enter)
        thread.wait_inside()
        g.vcpu.kick()
        thread.assert_leaves()


@_WAYS
def test_halted(enter: Callable[[Vcpu], Exit]) -> None:
    """A kick ends the wait of a halted vCPU, which sleeps in the kernel."""
    with guests.guest(guests.HALT, irqchip=True) as g:
        thread = _Thread(g.vcpu, enter)
        thread.wait_inside()
        g.vcpu.kick()
        thread.assert_leaves()


@_WAYS
def test_before_entry(enter: Callable[[Vcpu], Exit]) -> None:
    """A kick that comes before the vCPU first enters the guest keeps it out."""
    with guests.guest(guests.SPIN) as g:
        g.vcpu.kick()
        _Thread(g.vcpu, enter).assert_leaves()


@_WAYS
def test_immediate_exit(enter: Callable[[Vcpu], Exit]) -> None:
    """`immediate_exit` alone, without a signal, keeps the vCPU out of the guest."""
    with guests.guest(guests.SPIN) as g:
        g.vcpu.set_immediate_exit()
        _Thread(g.vcpu, enter).assert_leaves()


def test_signal_alone() -> None:
    """A signal ends `run()` without `immediate_exit`."""
    with guests.guest(guests.SPIN) as g:
        thread = _Thread(g.vcpu, _run)
        thread.wait_inside()
        signal_thread(thread.native_id, KICK_SIGNAL)
        thread.assert_leaves()
