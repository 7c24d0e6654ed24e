"""Disks without a device process, and the variables of firmware, under a real daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.test_vmm_blk import wait_for_socket
from tests.system.vhost_user_guests import (
    BOOT_MESSAGE,
    HAS_WRITTEN,
    WAS_REFUSED,
    boot_disk,
    overwriting_disk,
)
from tests.system.vmd.daemon import READY, ROOT, Daemon, descendants, process_title, vm_block
from vmm_kvm.boot.firmware import find_firmware
from vmm_kvm.images.create import create_qcow2

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
_PMEM_SIZE = 2 << 20
MARK = b"M"


def _image(folder: Path, size: int = _PMEM_SIZE) -> Path:
    image = folder / "disk.raw"
    image.write_bytes(bytes(size))
    return image


def _mappings(pid: object) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("private", [False, True])
def test_a_disk_that_is_memory(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory, private: bool
) -> None:
    """The VM's own process maps the image, shared or privately; there is no disk process."""
    image = _image(tmp_path_factory.mktemp("pmem"))
    options = " { private }" if private else ""
    with (
        start_vmd(vm_block("one", f'disk "{image}" format pmem{options}')) as vmd,
        vmd.client() as client,
    ):
        started = client.ask("start", name="one")
        assert started["type"] == "started", started
        with client.console("one") as console:
            console.expect(READY)
            assert b"1af4:105b" in console.output  # virtio-pmem, PCI ID 0x1040 + 27
        titles = {process_title(pid) for pid in descendants(vmd.process.pid)}
        assert "disk/one" not in titles
        (mapping,) = (line for line in _mappings(started["pid"]).splitlines() if str(image) in line)
        assert mapping.split()[1] == ("rw-p" if private else "rw-s")


def test_a_disk_that_is_memory_is_locked(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two VMs cannot both write the same memory disk."""
    image = _image(tmp_path_factory.mktemp("pmem"))
    lines = f'disk "{image}" format pmem'
    with (
        start_vmd(vm_block("one", lines) + vm_block("two", lines)) as vmd,
        vmd.client() as client,
    ):
        assert client.ask("start", name="one")["type"] == "started"
        refused = client.ask("start", name="two")
        assert (refused["type"], refused["code"]) == ("failed", "disk-missing")


def test_a_disk_of_a_wrong_size_is_no_memory(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The VM process reports a wrong size, in one line."""
    image = _image(tmp_path_factory.mktemp("pmem"), 4096)
    with (
        start_vmd(vm_block("one", f'disk "{image}" format pmem')) as vmd,
        vmd.client() as client,
    ):
        refused = client.ask("start", name="one")
        assert refused["type"] == "failed"
        assert refused["message"] == f"{image}: 4096 bytes, not a multiple of 2 MiB"


def test_a_disk_that_somebody_else_serves(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A vhost-user server that runs already serves the disk; the VM stops if the server ends."""
    folder = tmp_path_factory.mktemp("server")
    image, path = _image(folder), folder / "socket"
    server = subprocess.Popen(
        [sys.executable, "-m", "vmm_kvm.commands.vmm_blk", "--socket", str(path), str(image)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_socket(path, server)
        config = vm_block("one", f'disk "{path}" format vhost-user')
        with start_vmd(config) as vmd, vmd.client() as client:
            started = client.ask("start", name="one")
            assert started["type"] == "started", started
            with client.console("one") as console:
                console.expect(READY)
                assert b"1af4:1042" in console.output  # virtio-blk
            assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
            assert client.ask("start", name="one")["type"] == "started"
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()


def test_what_a_guest_reads_is_counted(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Statistics count reads of a disk: firmware has read at least two sectors."""
    image = tmp_path_factory.mktemp("disk") / "boot.raw"
    image.write_bytes(boot_disk(waits=True))
    config = f'vm "one" {{\n\tmemory 64M\n\tdisk "{image}"\n\tdisable\n}}\n'
    with start_vmd(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(BOOT_MESSAGE)
        vms = client.ask("status", name="one", statistics=True)["vms"]
        assert isinstance(vms, list)
        statistics = vms[0]["statistics"]
        assert 1024 <= statistics["disk_read"] <= image.stat().st_size
        assert statistics["disk_written"] == 0


@pytest.mark.parametrize("is_said", [False, True])
def test_a_guest_cannot_change_the_format_of_its_disk(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory, is_said: bool
) -> None:
    """A header with a base cannot be written to a probed image, and is plain data otherwise."""
    folder = tmp_path_factory.mktemp("disk")
    image, overlay = folder / "disk.raw", folder / "overlay"
    create_qcow2(str(overlay), 1 << 20, "/etc/passwd")
    header = overlay.read_bytes()[:512]
    before = overwriting_disk(header)
    image.write_bytes(before)
    said = " format raw" if is_said else ""
    config = f'vm "one" {{\n\tmemory 64M\n\tdisk "{image}"{said}\n\tdisable\n}}\n'
    with start_vmd(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(HAS_WRITTEN if is_said else WAS_REFUSED)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        told = "a qcow2 header, on a disk of which nobody has said that its format is raw"
        assert (told in vmd.log.read_text()) is not is_said
    expected = header + before[512:] if is_said else before
    assert image.read_bytes() == expected


def test_memory_that_is_to_be_encrypted(start_vmd: Start) -> None:
    """On a host without AMD SEV, a VM that asks for it does not start, for OpenBSD's reason."""
    if Path("/dev/sev").exists():
        pytest.skip("this host has SEV: never tried")
    blocks = vm_block("one", "sev") + vm_block("two", "seves")
    with start_vmd(blocks) as vmd, vmd.client() as client:
        for name in ("one", "two"):
            refused = client.ask("start", name=name)
            assert (refused["type"], refused["code"]) == ("failed", "EINVAL")
            assert refused["message"] == "/dev/sev not available"
            assert client.vm(name)["state"] == "stopped"


def test_variables_of_uefi_are_kept(start_vmd: Start, tmp_path: Path) -> None:
    """A VM with UEFI firmware has a file of variables, which starts as the firmware's template."""
    config = 'vm "one" {\n\tmemory 128M\n\tfirmware "uefi"\n\tdisable\n}\n'
    path = tmp_path / "state" / f"one-{os.geteuid()}.nvram"
    with start_vmd(config) as vmd, vmd.client() as client:
        for _ in range(2):
            started = client.ask("start", name="one")
            assert started["type"] == "started", started
            assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
            before = path.read_bytes()
            template = find_firmware("uefi").variables
            assert template is not None
            assert len(before) == Path(template).stat().st_size
            if before[-1:] != MARK:  # as a guest's write would change it
                with path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(MARK)
        assert path.read_bytes()[-1:] == MARK
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_start_leaves_no_variables(start_vmd: Start, tmp_path: Path) -> None:
    """If the guest never ran, the file of UEFI variables that its start has made is removed."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    lines = ["memory 128M", 'firmware "uefi"', f'disk "{disk}" format raw', "disable"]
    config = "\n".join(['vm "one" {', *(f"\t{line}" for line in lines), "}", ""])
    with start_vmd(config) as vmd, vmd.client() as client:
        disk.unlink()
        assert client.ask("start", name="one")["code"] == "disk-missing"
        assert list((tmp_path / "state").glob("*.nvram")) == []


def test_a_disk_process_ends_in_order(start_vmd: Start, tmp_path: Path) -> None:
    """A disk process ends after its VM, and logs nothing."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{disk}" format raw')
    with start_vmd(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
    log = vmd.log.read_text()
    assert "Traceback" not in log
    assert "its process" not in log
