"""VMs under a real daemon, from start to end, with the self-test guest."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import tty
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import artifacts
from tests.system.vmd.daemon import (
    READY,
    ROOT,
    SELFTEST,
    Client,
    Daemon,
    is_alive,
    vm_block,
)

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def _parent_of(pid: int) -> int:
    """Return the pid of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _end(pid: int) -> None:
    """Kill a process that is no child of ours, and wait until it is gone."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, f"pid {pid} does not end"
        time.sleep(0.02)


def test_enabled_vms_start_and_others_do_not(start_vmd: Start) -> None:
    """A VM of vm.conf runs when the daemon is ready, unless it is disabled; its tty works."""
    config = vm_block("one", enabled=True) + vm_block("two")
    with start_vmd(config) as vmd, vmd.client() as client:
        one = client.wait_for_state("one", "running")
        assert client.vm("two")["state"] == "stopped"
        assert isinstance(one["pid"], int)
        assert is_alive(one["pid"])
        assert str(one["tty"]).startswith("/dev/pts/")
        assert vmd.stop() == 0
        assert not is_alive(one["pid"])


def test_start_and_stop_by_hand(start_vmd: Start) -> None:
    """A start is answered once the guest runs; a waiting stop once its process is gone."""
    with start_vmd(vm_block("one")) as vmd, vmd.client() as client:
        started = client.ask("start", name="one", serial=7)
        assert (started["type"], started["serial"], started["id"]) == ("started", 7, 1)
        pid = started["pid"]
        assert isinstance(pid, int)
        assert client.ask("start", name="one")["code"] == "EALREADY"
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
        assert not is_alive(pid)
        assert client.ask("stop", name="one")["code"] == "not-running"
        again = client.ask("start", name="one")
        assert (again["type"], again["id"]) == ("started", 1)


def test_a_kernel_is_unpacked_once(start_vmd: Start) -> None:
    """A VM process gets a kernel that another has unpacked, and boots it."""
    kernel = artifacts.kernel("cloud").vmlinuz
    with start_vmd(vm_block("one", boot=kernel, memory="128M")) as vmd, vmd.client() as client:
        client.ask("log", level=2)
        for what in ("kept", "lent"):
            assert client.ask("start", name="one")["type"] == "started"
            vmd.wait_for_log(f"vm 1: unpacked kernel {what}")
            stopped = client.ask("stop", name="one", force=True, wait=True)
            assert stopped["type"] == "terminated"


def test_every_waiter_is_answered(start_vmd: Start) -> None:
    """Two clients that wait for a VM, and one that stops it by force, all get an answer."""
    with (
        start_vmd(vm_block("one", enabled=True)) as vmd,
        vmd.client() as first,
        vmd.client() as second,
        vmd.client() as third,
    ):
        first.wait_for_state("one", "running")
        first.send("wait", name="one")
        second.send("wait", name="one")
        # A round trip each: control reads clients in any order.
        second.send("status", name="one", serial=1)
        assert second.receive()[0]["serial"] == 1
        third.send("status", name="one", serial=1)
        assert third.receive()[0]["serial"] == 1
        assert third.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert first.receive()[0]["type"] == "terminated"
        assert second.receive()[0]["type"] == "terminated"


def test_a_guest_that_does_nothing_is_counted(start_vmd: Start) -> None:
    """A VM with a halted guest has statistics at the first request."""
    with start_vmd(vm_block("one")) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(READY)
        vms = client.ask("status", name="one", statistics=True)["vms"]
        assert isinstance(vms, list)
        assert vms[0]["statistics"]["cpu_ns"] > 0
        assert client.ask("pause", name="one")["type"] == "done"


def test_pause_and_unpause(start_vmd: Start) -> None:
    """A paused guest does not run: typed input has no echo until it is unpaused."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            assert client.ask("pause", name="one")["type"] == "done"
            assert client.vm("one")["state"] == "paused"
            pid = client.vm("one")["pid"]
            before = _cpu_ticks(pid)
            time.sleep(0.3)
            assert _cpu_ticks(pid) - before <= 1
            assert client.ask("pause", name="one")["type"] == "done"
            assert client.ask("unpause", name="one")["type"] == "done"
            assert client.vm("one")["state"] == "running"
            console.type(b"r")  # reboots the guest, which shows that it runs
            console.read_to_end()


def _cpu_ticks(pid: object) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_reboot_keeps_id_and_terminal_and_what_was_shown(start_vmd: Start) -> None:
    """After a reboot a VM has another process, but the same tty, id and all earlier output."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        before = client.vm("one")
        with client.console("one") as console:
            console.expect(READY)
            console.type(b"r")
            console.read_to_end()
        after = client.wait_for_reboot("one", before["pid"])
        assert (after["id"], after["tty"]) == (before["id"], before["tty"])
        with client.console("one") as console:
            console.expect(READY, count=2)
        assert client.vm("one")["pid"] != before["pid"]


def test_a_wait_ends_with_a_reboot(start_vmd: Start) -> None:
    """As in OpenBSD, a reboot of the guest answers clients that wait for the VM."""
    with (
        start_vmd(vm_block("one", enabled=True)) as vmd,
        vmd.client() as client,
        vmd.client() as other,
    ):
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            other.send("wait", name="one")
            other.send("status", serial=1)
            assert other.receive()[0]["serial"] == 1
            console.type(b"r")
            assert other.receive()[0]["type"] == "terminated"


def test_a_guest_that_powers_off_is_stopped(start_vmd: Start) -> None:
    """A VM whose guest powers off stays known, and is stopped."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            console.type(b"p")
            console.read_to_end()
        stopped = client.wait_for_state("one", "stopped")
        assert (stopped["pid"], stopped["tty"]) == (None, "")


def test_the_console_of_a_late_client_and_of_a_terminal(start_vmd: Start) -> None:
    """Earlier output is shown to each stream and to the terminal, when they attach."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as first, client.console("one") as second:
            first.expect(READY)
            second.expect(READY)
            path = str(client.vm("one")["tty"])
            terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
            try:
                tty.setraw(terminal)
                shown = b""
                while READY not in shown:
                    assert select.select([terminal], [], [], 30)[0], shown
                    shown += os.read(terminal, 4096)
                # Input at the terminal reaches the guest too.
                os.write(terminal, b"p")
                first.read_to_end()
            finally:
                os.close(terminal)


def test_the_console_of_a_vm_that_is_about_to_start(start_vmd: Start) -> None:
    """A console opened before the VM has a process gets the terminal and all output."""
    with start_vmd(vm_block("one")) as vmd, vmd.client() as client:
        client.send("start", name="one")
        with client.console("one") as console:  # answered before the start
            assert client.receive()[0]["type"] == "started"
            console.expect(READY)
        client.send("start", name="none", disks=[{"path": "/nowhere"}], memory=64 << 20)
        client.send("console", name="none")
        answers = {client.receive()[0]["code"] for _ in range(2)}
        # A VM that only its start has defined is gone after a failed start.
        assert answers in ({"disk-missing", "not-running"}, {"disk-missing", "ENOENT"})


def test_an_image_that_another_vm_uses(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second VM with a disk cannot start while the first runs, and can afterwards."""
    image = tmp_path_factory.mktemp("disk") / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{image}"', enabled=True) + vm_block("two", f'disk "{image}"')
    with start_vmd(config) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        failed = client.ask("start", name="two")
        assert failed["code"] == "disk-missing"
        assert str(image) in str(failed["message"])
        assert client.vm("two")["state"] == "stopped"
        client.ask("stop", name="one", wait=True)
        assert client.ask("start", name="two")["type"] == "started"


def test_files_that_are_gone(start_vmd: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """If a kernel or disk has vanished since the configuration was read, the start names it."""
    directory = tmp_path_factory.mktemp("gone")
    kernel, disk = directory / "kernel", directory / "disk"
    kernel.write_bytes(SELFTEST.read_bytes())
    disk.write_bytes(bytes(1 << 20))
    config = vm_block("one", boot=kernel) + vm_block("two", f'disk "{disk}"')
    with start_vmd(config) as vmd, vmd.client() as client:
        kernel.unlink()
        disk.unlink()
        for name, code, path in (("one", "ENOENT", kernel), ("two", "disk-missing", disk)):
            failed = client.ask("start", name=name)
            assert (failed["type"], failed["code"]) == ("failed", code)
            assert f"{path}: No such file or directory" in str(failed["message"])
            assert client.vm(name)["state"] == "stopped"


def test_a_boot_image_that_is_nothing(
    start_vmd: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A fault of a boot image that the VM's process finds reaches the client."""
    kernel = tmp_path_factory.mktemp("kernel") / "kernel"
    kernel.write_bytes(b"no kernel")
    with start_vmd(vm_block("one", boot=kernel)) as vmd, vmd.client() as client:
        failed = client.ask("start", name="one")
        assert (failed["type"], failed["code"]) == ("failed", "EINVAL")
        assert str(kernel) in str(failed["message"])
        assert client.vm("one")["state"] == "stopped"


def test_reload_keeps_vms_that_run(start_vmd: Start) -> None:
    """SIGHUP forgets VMs that do not run, reads the file again, and leaves running VMs alone."""
    with start_vmd(vm_block("one", enabled=True) + vm_block("two")) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        vmd.config.write_text(vm_block("one", enabled=True) + vm_block("three"))
        for _ in range(5):
            vmd.process.send_signal(signal.SIGHUP)
        vmd.wait_for_log("reload requested with SIGHUP")
        assert client.wait_for_state("three", "stopped")["is_from_config"] is True
        assert client.ask("status", name="two")["vms"] == []
        assert client.vm("one")["pid"] == pid
        assert client.vm("one")["pid"] == pid


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("nonsense\n", ["{}:1: syntax error at the end of the line"]),
        ('vm "my vm" { boot "/dev/null" }\n', ['{}:1: vm "my vm" failed: invalid VM name']),
        (
            'vm "none" instance "i" { memory 64M }\n',
            ['{}:1: vm "i" failed: no VM "none"'],
        ),
        (
            'vm "a" { boot "/none" }\nvm "b" {\n\tmemory 1\n}\n',
            [
                "{}:1: kernel path not found: No such file or directory",
                "memory size must be at least 1MB",
                "{}:3: failed to parse size: 1",
            ],
        ),
    ],
)
def test_a_configuration_with_a_mistake_changes_nothing(
    start_vmd: Start, text: str, lines: list[str]
) -> None:
    """Reload and load report faults and their places; all VMs stay, running or not."""
    with start_vmd(vm_block("one", enabled=True) + vm_block("two")) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        vmd.config.write_text(text)
        expected = [line.format(vmd.config) for line in lines]
        for failed in (client.ask("reload"), client.ask("load", path=str(vmd.config))):
            assert (failed["type"], failed["code"]) == ("failed", "command-failed")
            assert failed["lines"] == expected
            assert client.vm("one")["pid"] == pid
            assert client.vm("two")["state"] == "stopped"
        missing = client.ask("load", path=f"{vmd.config}.none")
        assert missing["lines"] == [f"failed to open {vmd.config}.none: No such file or directory"]
        assert len(client.vms()) == 2


def test_broken_vms_can_be_skipped(tmp_path: Path) -> None:
    """With --skip-broken a VM with a missing file, or a bad name, does not affect the others."""
    config = vm_block("one", 'disk "/none.img"', enabled=True)
    config += vm_block("my vm", enabled=True) + vm_block("two", enabled=True)
    with Daemon(tmp_path, config, options=("--skip-broken",)) as vmd, vmd.client() as client:
        client.wait_for_state("two", "running")
        assert [vm["name"] for vm in client.vms()] == ["two"]
        vmd.wait_for_log('vm "one" is left out')
        vmd.wait_for_log('vm "my vm" failed: invalid VM name')


def test_relative_paths_in_the_background(tmp_path: Path) -> None:
    """`vmd -f vm.conf` in the background finds relative paths, also at a reload."""
    (tmp_path / "vm.conf").write_text(vm_block("one", boot=Path("boot.bin")))
    (tmp_path / "boot.bin").write_bytes(SELFTEST.read_bytes())
    command = [sys.executable, "-m", "vmd", "--user", "--socket", "vmd.sock", "-f", "vm.conf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STATE_DIRECTORY": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, timeout=60)
    assert done.returncode == 0
    with Client(tmp_path / "vmd.sock") as client:
        started = client.ask("start", name="one")
        assert started["type"] == "started"
        assert isinstance(started["pid"], int)
        daemon = _parent_of(_parent_of(started["pid"]))  # the VM's parent is vmm
        try:
            assert client.ask("reload")["type"] == "done"
            assert client.vm("one")["state"] == "running"
        finally:
            _end(daemon)


def test_a_named_configuration_has_to_be_there(tmp_path: Path) -> None:
    """Only the default file may be absent: a start with another name fails, and names it."""
    command = [sys.executable, "-m", "vmd", "--user", "--socket", "vmd.sock", "-f", "none.conf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STATE_DIRECTORY": str(tmp_path)}
    for option in ("-n", "-d"):
        done = subprocess.run(
            [*command, option],
            cwd=tmp_path,
            env=environment,
            timeout=60,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "failed to open none.conf: No such file or directory" in done.stderr
        assert "configuration OK" not in done.stderr
    assert (
        subprocess.run(command, cwd=tmp_path, env=environment, check=False, timeout=60).returncode
        == 1
    )
    assert not (tmp_path / "vmd.sock").exists()


@pytest.mark.parametrize("options", [["-d"], []], ids=["foreground", "background"])
def test_a_start_that_fails_ends(tmp_path: Path, options: list[str]) -> None:
    """A daemon that cannot read its configuration ends at once."""
    command = [sys.executable, "-m", "vmd", "--user", *options, "-f", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--socket", str(tmp_path / "vmd.sock")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1


def test_reset_ends_all_vms(start_vmd: Start) -> None:
    """Reset is answered when no VM is left; ids start again at 1."""
    config = vm_block("one", enabled=True) + vm_block("two", enabled=True)
    with start_vmd(config) as vmd, vmd.client() as client:
        pids = [client.wait_for_state(name, "running")["pid"] for name in ("one", "two")]
        assert client.ask("reset", mode="vms")["type"] == "done"
        assert client.ask("status")["vms"] == []
        assert not any(is_alive(pid) for pid in pids if isinstance(pid, int))
        assert client.ask("load", path=str(vmd.config))["type"] == "done"
        assert client.wait_for_state("one", "running")["id"] == 1


def test_a_kernel_that_the_client_opened(start_vmd: Start) -> None:
    """A VM that a client makes boots the passed descriptor, and vanishes at its end."""
    with start_vmd("") as vmd, vmd.client() as client, SELFTEST.open("rb") as kernel:
        started = client.ask(
            *("start", (kernel.fileno(),)),
            name="ad-hoc",
            memory=64 << 20,
            kernel=0,
            kernel_path=str(SELFTEST),
        )
        assert started["type"] == "started", started
        with client.console("ad-hoc") as console:
            console.expect(READY)
        assert client.ask("stop", name="ad-hoc", wait=True)["type"] == "terminated"
        assert client.ask("status")["vms"] == []


def test_a_vm_that_dies_right_after_its_start_leaves_a_trace(start_vmd: Start) -> None:
    """A VM that no file configures vanishes at its end; its end and its log stay known."""
    with start_vmd(vm_block("template", "allow instance { boot }")) as vmd, vmd.client() as client:
        started = client.ask("start", name="brief", instance="template")
        assert started["type"] == "started", started
        pid = started["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        while client.ask("status", name="brief")["vms"] != []:
            time.sleep(0.02)
        found = client.ask("status", name="brief", gone=True)["vms"]
        assert isinstance(found, list)
        (gone,) = found
        end = gone["last_end"]
        assert (gone["state"], end["reason"], end["exit"]) == ("gone", "died", -signal.SIGKILL)
        lines = client.ask("history", name="brief")["lines"]
        assert isinstance(lines, list)
        texts = [line["text"] for line in lines]
        assert "started" in texts
        assert "failed: the VM process was killed by signal 9" in texts
        assert any(text.startswith("started by ") for text in texts)
        vmd.wait_for_log("vm/brief: failed: the VM process was killed by signal 9")


def test_what_a_vm_boots_and_its_disks_are_shown(start_vmd: Start, tmp_path: Path) -> None:
    """Show tells the kernel, and each disk with its options."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    lines = (f'disk "{disk}" format raw {{ ro serial "x" }}', 'append "quiet"')
    with start_vmd(vm_block("one", *lines)) as vmd, vmd.client() as client:
        (vm,) = list(client.ask("status", name="one", devices=True)["vms"])  # type: ignore[call-overload]
        assert (vm["boot"], vm["append"], vm["cdrom"]) == (str(SELFTEST), "quiet", "")
        told = {"path": str(disk), "format": "raw", "is_read_only": True, "serial": "x"}
        assert vm["disks"] == [{**told, "is_snapshot": False}]
        assert client.vm("one")["disks"] == []
