"""Event fds on real KVM: notifications that need no exit, messages that need no thread."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests import guests
from tests.guests import Guest, guest
from vmm_kvm.kvm.eventfds import EventFds
from vmm_kvm.kvm.exits import IoExit

pytestmark = pytest.mark.kvm

MSI_ADDRESS = 0xFEE0_0000
FIRST_GSI = 24
LAPIC_SVR, LAPIC_IRR = 0xF0, 0x200
SVR_ENABLED = 1 << 8
DEADLINE_S = 10.0


@pytest.fixture
def halted() -> Iterator[Guest]:
    """A guest whose local APIC takes messages."""
    with guest(guests.HALT, irqchip=True) as made:
        lapic = made.vcpu.get_lapic()
        lapic.regs[LAPIC_SVR + 1] |= SVR_ENABLED >> 8
        made.vcpu.set_lapic(lapic)
        yield made


def pending(of: Guest) -> set[int]:
    """Return the vectors that are pending in the local APIC."""
    regs = bytes(byte & 0xFF for byte in of.vcpu.get_lapic().regs)
    return {
        vector
        for vector in range(256)
        if regs[LAPIC_IRR + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1
    }


def arrives(of: Guest, vector: int) -> bool:
    """Wait until a vector is pending: a thread of the kernel sends held-back messages."""
    deadline = time.monotonic() + DEADLINE_S
    while vector not in pending(of) and time.monotonic() < deadline:
        time.sleep(0.001)
    return vector in pending(of)


def test_lines_send_their_messages(halted: Guest) -> None:
    """Each line has a message of its own, and sends it on a write to its eventfd."""
    with EventFds(halted.vm, (), FIRST_GSI) as eventfds:
        first, second = eventfds.msi_line(), eventfds.msi_line()
        first.route((MSI_ADDRESS, 0x41))
        second.route((MSI_ADDRESS, 0x42))
        second.signal()
        assert pending(halted) == {0x42}
        os.eventfd_write(first.fd, 1)
        assert pending(halted) == {0x41, 0x42}


def test_a_line_without_a_message_waits(halted: Guest) -> None:
    """A signal before there is a message, or while it is held back, is sent with it."""
    with EventFds(halted.vm, (), FIRST_GSI) as eventfds:
        line = eventfds.msi_line()
        line.signal()
        assert pending(halted) == set()
        line.route((MSI_ADDRESS, 0x51))
        assert arrives(halted, 0x51)
        line.route(None)
        line.route(None)
        line.signal()
        line.signal()
        assert pending(halted) == {0x51}
        line.route((MSI_ADDRESS, 0x52))
        assert arrives(halted, 0x52)
        line.route((MSI_ADDRESS, 0x53))
        line.signal()
        assert pending(halted) == {0x51, 0x52, 0x53}


def test_a_message_without_a_line(halted: Guest) -> None:
    """A message can be sent without a line."""
    with EventFds(halted.vm, (), FIRST_GSI) as eventfds:
        eventfds.send_msi(MSI_ADDRESS, 0x61)
        assert pending(halted) == {0x61}


@pytest.mark.parametrize(
    "message", [(0, 0), ((1 << 64) - 1, (1 << 32) - 1), (MSI_ADDRESS, 0x700), (0xFEE7_F000, 0x41)]
)
def test_messages_that_cannot_be(halted: Guest, message: tuple[int, int]) -> None:
    """A message to any address of the guest's choice is harmless, and the line works on."""
    with EventFds(halted.vm, (), FIRST_GSI) as eventfds:
        eventfds.send_msi(*message)
        line = eventfds.msi_line()
        line.signal()
        line.route(message)
        line.signal()
        line.route(None)
        line.route((MSI_ADDRESS, 0x71))
        line.signal()
        assert arrives(halted, 0x71)


def test_notifications() -> None:
    """A guest's write of any size signals the eventfd and is no exit, until it is unbound."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    code = guests.WRITE_PORT[:-1] + guests.READ_PORT[:-1] + guests.WRITE_PORT
    try:
        with (
            guest(code, irqchip=True) as made,
            EventFds(made.vm, (), FIRST_GSI) as eventfds,
        ):
            eventfds.bind_notification(fd, guests.PORT)
            eventfds.bind_notification(fd, guests.PORT)  # KVM refuses it, which does no harm
            reason = made.vcpu.run()
            assert isinstance(reason, IoExit)
            assert not reason.is_write
            assert os.eventfd_read(fd) == 3
            eventfds.unbind_notification(fd, guests.PORT)
            eventfds.unbind_notification(fd, guests.PORT)
            while not reason.is_write:
                reason = made.vcpu.run()
                assert isinstance(reason, IoExit)
    finally:
        os.close(fd)
