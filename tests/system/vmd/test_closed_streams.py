"""A daemon that starts with some of descriptors 0 to 2 closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.closed_streams import PRINTED, closing, image
from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import Daemon, vm_block

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
@pytest.mark.parametrize("is_user", [True, False], ids=["user", "root"])
def test_a_closed_descriptor_is_never_a_disk(
    closed: str, is_user: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whichever are closed, an image holds its guest's writes, and the console its output."""
    reason = None if is_user else missing_separation()
    if reason:
        pytest.skip(reason)
    disk, expected = image(tmp_path_factory.mktemp("disk") / "disk.img")
    config = vm_block("one", f'disk "{disk}" format raw').replace("boot ", "# boot ")
    prefix = closing(closed, [])
    with Daemon(tmp_path, config, is_user=is_user, prefix=prefix) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(b"U" * 100, PRINTED // 100)
        client.wait_for_state("one", "stopped")
        assert vmd.stop() == 0
    assert disk.read_bytes() == expected
