"""Networks of unmodified Debian kernels under vmd: an address by DHCP, on each data path."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import artifacts, media
from tests.guest.daemon_guest import without_vhost
from tests.guest.linux_guest import COMMAND_LINE
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, Stream, vm_block
from tests.system.vmd.netns import Namespace
from tests.vmctl_driver import BOOT_TIMEOUT_S
from tests.webserver import Request, WebServer

pytestmark = [
    *(pytest.mark.guest, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)),
    needs_separation,
]

HOST, GUEST = "100.64.1.2", "100.64.1.3"
_LEASE = (
    "#!/bin/sh",
    '[ "$1" = bound ] || exit 0',
    "ip addr add $ip/$mask dev $interface && ip route add default via $router",
)


@pytest.fixture
def space() -> Iterator[Namespace]:
    """Make a namespace to run a daemon in."""
    with Namespace() as found:
        yield found


def run(console: Stream, command: str, number: int) -> str:
    """Run a command in the guest's shell; returns its output, with the command's echo."""
    seen = len(console.output)
    console.type(f"{command}; echo end''-{number}=$?\n".encode())
    console.expect(f"end-{number}=".encode())
    return console.output[seen:].decode("latin-1")


@pytest.mark.parametrize("path", ["vhost", "process"])
def test_a_local_interface(
    path: str, space: Namespace, tmp_path: Path, cloud_kernel: artifacts.Kernel
) -> None:
    """The guest gets its address from the daemon, and host and guest reach each other.

    Without vhost-net a process of its own moves the frames; the VM outlives it.
    """
    if path == "vhost" and not Path("/dev/vhost-net").exists():
        pytest.skip("no /dev/vhost-net")
    config = vm_block(
        "linux",
        "local interface",
        f'initrd "{artifacts.net_initramfs(cloud_kernel)}"',
        f'append "{COMMAND_LINE} test=shell"',
        boot=cloud_kernel.vmlinuz,
        memory="128M",
    )
    prefix = [*space.prefix, *(() if path == "vhost" else without_vhost(tmp_path))]
    with (
        Daemon(tmp_path, config, is_user=False, prefix=prefix) as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
    ):
        assert client.ask("start", name="linux")["type"] == "started"
        with client.console("linux") as console:
            console.expect(b"# ")
            run(console, "dmesg -n 1; ip link set eth0 up", 1)
            lines = ";".join(f"echo '{line}'" for line in _LEASE)
            run(console, f"({lines}) >/lease; chmod +x /lease", 2)
            assert f"lease of {GUEST} obtained" in run(
                console, "udhcpc -i eth0 -n -q -s /lease 2>&1", 3
            )
            assert " 0% packet loss" in run(console, f"ping -c 3 {HOST}", 4)
            shown = space.run("busybox", "ping", "-c", "3", GUEST)
            assert " 0% packet loss" in shown
            movers = nic_processes()
            assert len(movers) == (path == "process")
            for pid in movers:
                os.kill(pid, signal.SIGKILL)
                run(console, f"ping -c 2 -W 1 {HOST}", 5)
        assert client.vm("linux")["state"] == "running"
        assert vmd.stop() == 0
        assert space.links() == {"lo"}


def test_ipxe_boots_a_kernel_of_the_hosts(
    space: Namespace, tmp_path: Path, cloud_kernel: artifacts.Kernel
) -> None:
    """A boot loader gets its address from the daemon, and files from a server on the host."""
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(cloud_kernel.vmlinuz, files / "linux")
    shutil.copy(artifacts.guest_initramfs(cloud_kernel), files / "initrd")
    disc = media.ipxe_script_iso(
        tmp_path / "ipxe.iso",
        f"dhcp\nkernel http://{HOST}/linux {COMMAND_LINE} test=report\n"
        f"initrd http://{HOST}/initrd\nboot",
    )
    config = vm_block(
        "netboot", "local interface", f'cdrom "{disc}"', boot=artifacts.seabios(), memory="256M"
    )
    server = space.within(lambda: WebServer(files))
    with (
        server.serving(),
        Daemon(tmp_path, config, is_user=False, prefix=space.prefix) as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
    ):
        assert client.ask("start", name="netboot")["type"] == "started"
        with client.console("netboot") as console:
            console.expect(b"iPXE")
            console.expect(b"init: up")
            console.expect(f"report: release {cloud_kernel.release}".encode())
            console.read_to_end()
        client.wait_for_state("netboot", "stopped")
        assert vmd.stop() == 0
    assert server.requests == [Request(GUEST, "/linux", 200), Request(GUEST, "/initrd", 200)]


def nic_processes() -> list[int]:
    """Return the processes that move the guest's frames."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if entry.read_bytes() == b"nic/linux\n":
                found.append(int(entry.parent.name))
    return found
