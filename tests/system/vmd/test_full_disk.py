"""VMs on a host without room for their disks, under a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable

import pytest

from tests.filling_guest import (
    HAS_WRITTEN,
    WAS_REFUSED,
    SmallFileSystem,
    is_filled,
    make_disk,
    small_file_system,
)
from tests.system.vmd.daemon import Client, Daemon
from tests.vmctl_driver import VMCTL
from vmm_kvm.block.image import Format

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def config(small: SmallFileSystem, disk_format: Format, options: str = "") -> str:
    """Make a disk, and return the configuration of a VM that boots from it and fills it."""
    disk = small.place / "disk.img"
    make_disk(disk, disk_format)
    block = f" {{ {options} }}" if options else ""
    return (
        f'vm "one" {{\n\tmemory 64M\n\tdisk "{disk}" format {disk_format}{block}\n\tdisable\n}}\n'
    )


def wait_for_pause(events: Client, message: str) -> None:
    """Wait for the event that the VM is paused, with this reason."""
    while True:
        event, _ = events.receive()
        assert event["kind"] not in {"failed", "stopped"}, event
        if event["kind"] == "paused":
            assert event["message"] == message
            return


def vmctl(vmd: Daemon, *words: str) -> str:
    """Run a command; returns its output."""
    done = subprocess.run(
        [str(VMCTL), *words],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
    )
    return done.stdout


@pytest.mark.parametrize("disk_format", list(Format))
def test_a_vm_is_paused_until_there_is_room(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory, disk_format: Format
) -> None:
    """A VM is shown as paused, with the reason; unpause retries, once in vain; nothing is lost."""
    with small_file_system(tmp_path_factory.mktemp("full") / "small") as small:
        disk = small.place / "disk.img"
        with (
            start_vmd(config(small, disk_format)) as vmd,
            vmd.client() as client,
            vmd.client() as events,
        ):
            events.ask("events")
            assert client.ask("start", name="one")["type"] == "started"
            told = f"no space: {disk}: No space left on device"
            wait_for_pause(events, told)
            vm = client.vm("one")
            assert (vm["state"], vm["pause_reason"]) == ("paused", "no space")
            line = vmctl(vmd, "status", "one").splitlines()[1].split()
            assert line[7:] == ["paused", "(no", "space)", "one"]
            (as_json,) = json.loads(vmctl(vmd, "status", "--json", "one"))
            assert (as_json["state"], as_json["pause_reason"]) == ("paused", "no space")
            assert client.ask("unpause", name="one")["type"] == "done"
            wait_for_pause(events, told)
            small.free()
            vmctl(vmd, "unpause", "one")
            with client.console("one") as console:
                console.expect(HAS_WRITTEN)
            assert client.vm("one")["pause_reason"] == ""
            assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
            log = vmd.log.read_text()
            assert f"vm/one: paused: {disk}: No space left on device" in log
            assert "[Errno" not in log
        assert is_filled(disk, disk_format)


def test_a_guest_is_told_where_that_was_asked_for(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With `error report` the write fails, and the VM runs on."""
    with (
        small_file_system(tmp_path_factory.mktemp("full") / "small") as small,
        start_vmd(config(small, Format.RAW, "error report")) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(WAS_REFUSED)
        assert client.vm("one")["state"] == "running"


@pytest.mark.parametrize("is_forced", [False, True])
def test_a_vm_without_room_can_be_stopped(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory, is_forced: bool
) -> None:
    """A VM without room can be stopped: it ends at its time-out, or at once."""
    with (
        small_file_system(tmp_path_factory.mktemp("full") / "small") as small,
        start_vmd(config(small, Format.RAW)) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="one")["type"] == "started"
        client.wait_for_state("one", "paused")
        stopped = client.ask("stop", name="one", force=is_forced, wait=True)
        assert stopped["type"] == "terminated"
        assert client.vm("one")["state"] == "stopped"


def test_a_vm_that_is_stopped_goes_on_with_room(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """During a stop no unpause is possible: the write is tried again and again."""
    with (
        small_file_system(tmp_path_factory.mktemp("full") / "small") as small,
        start_vmd(config(small, Format.RAW)) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="one")["type"] == "started"
        client.wait_for_state("one", "paused")
        before = (small.place / "disk.img").stat().st_blocks
        small.free()
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
        assert (small.place / "disk.img").stat().st_blocks > before


def test_a_pause_and_a_full_disk_at_once(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One unpause lifts a user's pause and retries the write."""
    with (
        small_file_system(tmp_path_factory.mktemp("full") / "small") as small,
        start_vmd(config(small, Format.RAW)) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="one")["type"] == "started"
        client.wait_for_state("one", "paused")
        assert client.ask("pause", name="one")["type"] == "done"
        small.free()
        assert client.ask("unpause", name="one")["type"] == "done"
        with client.console("one") as console:
            console.expect(HAS_WRITTEN)
