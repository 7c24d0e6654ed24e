"""Ways into a kernel that need a KVM with all processor modes; tests/kvm has the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kvm.test_boot_paths import IMAGES, NEEDS_GUEST_KVM, STATUS, run_image

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("name", NEEDS_GUEST_KVM)
def test_kernel_finds_what_its_protocol_promises(name: str, tmp_path: Path) -> None:
    """At the first instruction, registers and memory are as the protocol says."""
    assert run_image(tmp_path / name, IMAGES[name]) == (STATUS, b"")
