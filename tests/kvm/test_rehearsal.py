"""A VM process's life, as the zygote rehearses it in advance."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import partial

import pytest

from vmd.vm.process import be_vm
from vmd.vm.receiving import receive
from vmd.vm.rehearsing import rehearse
from vmd.wire.internal import VmSpec
from vmd.wire.transfers import ReceivedSpec
from vmd.zygote.warm.rehearsal import Rehearsal
from vmm_kvm.bits import MIB
from vmm_kvm.errors import SnapshotError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.memfd import make_constant, make_memory

pytestmark = pytest.mark.kvm

CLONE = VmSpec(
    id=0,
    name="clone",
    memory=MIB,
    cpus=1,
    tty=0,
    ring=1,
    boot=None,
    boot_path="clone",
    received=ReceivedSpec(stream=2, manifest="", stays_paused=True, memory=3, is_copy=True),
)


@pytest.fixture
def rehearsal() -> Iterator[Rehearsal]:
    """Return the scene."""
    install_kick_signal()
    with Rehearsal() as made:
        yield made


def test_the_guest_ends_by_itself(rehearsal: Rehearsal, caplog: pytest.LogCaptureFixture) -> None:
    """Every rehearsal ends with the guest's last instruction, and without an error."""
    with Kvm() as kvm, caplog.at_level(logging.WARNING):
        for _ in range(3):
            rehearsal.play(partial(be_vm, kvm))
    assert caplog.messages == []


def test_a_clone_is_rehearsed(caplog: pytest.LogCaptureFixture) -> None:
    """A process that waits makes a machine and a copy of it, and leaves nothing of them open."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    with Kvm() as kvm, caplog.at_level(logging.WARNING):
        for _ in range(2):
            rehearse(kvm, is_clone=True)
    assert caplog.messages == []
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names alone


@pytest.mark.parametrize(
    ("left", "text"),
    [
        ((), "state: cannot mmap an empty file"),
        ((b"VMMKVM",), "header: the stream ends too early"),
    ],
)
def test_a_clone_of_nothing_is_refused(left: tuple[bytes, ...], text: str) -> None:
    """What another VM's process has left is read with care, and its descriptor closed."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    memory = make_memory("clone", MIB)
    with Kvm() as kvm, pytest.raises(SnapshotError, match=text):
        receive(make_constant("clone", left), CLONE, kvm, is_private=True, ram_fd=memory)
    os.close(memory)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - names alone
