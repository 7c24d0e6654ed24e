"""Campaign: Debian's installer under vmd, on a network of vmd's with a mirror on the host's side.

The netboot kernel and initrd start with answers to all questions. The installer, on the serial
console, gets its address and its name from vmd's DHCP server, downloads an index, drivers and the
step that partitions from the mirror, and makes a file system on a virtio disk. After its power-off,
the mirror must have requests from the lent address alone, e2fsck and `qemu-img check` must find the
disk sound, and the written file must be there.

The console is shown. The first deviation ends the campaign with its text and status 1. It needs
root and a KVM that runs a distribution kernel; the rig is one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import installed, installer  # noqa: E402 - found by the line above
from tests.system.vmd.daemon import Daemon, vm_block  # noqa: E402
from tests.system.vmd.netns import Namespace  # noqa: E402
from tests.webserver import WebServer  # noqa: E402

NAME = "installer"
HOST, GUEST = "100.64.1.2", "100.64.1.3"
_SECTOR = 512
# The longest silence: unpacking 40 MB when each instruction of the guest is emulated twice.
SILENCE_S = 600.0


def install(folder: Path) -> None:
    """Run the installer to the end of its partitioning, and check its results."""
    found = installer.installer()
    installer.make_mirror(found, folder / "mirror")
    disk = folder / "disk.qcow2"
    installed.create("-s", "256M", disk)
    config = vm_block(
        NAME,
        "local interface",
        f'disk "{disk}"',
        f'initrd "{installer.preseeded(found, HOST, folder / "initrd")}"',
        f'append "{installer.COMMAND_LINE}"',
        boot=found.vmlinuz,
        memory="1536M",
    )
    with ExitStack() as stack:
        space = stack.enter_context(Namespace())
        mirror = space.within(lambda: WebServer(folder / "mirror"))
        stack.enter_context(mirror.serving())
        vmd = stack.enter_context(Daemon(folder, config, is_user=False, prefix=space.prefix))
        client = stack.enter_context(vmd.client(SILENCE_S))
        begun = time.monotonic()
        assert client.ask("start", name=NAME)["type"] == "started"
        console = stack.enter_context(client.console(NAME, show))
        times = []
        for text in (
            "Loading additional components",
            f"partition: address {GUEST}/31",
            f"partition: name {NAME}",
            installer.DONE,
        ):
            console.expect(text.encode())
            times.append(f"{text}: after {time.monotonic() - begun:.0f} s")
        console.read_to_end()
        client.wait_for_state(NAME, "stopped")
        assert vmd.stop() == 0
    print("", *times, sep="\n", flush=True)
    check_requests(mirror)
    check_disk(disk, folder / "disk.raw")


def show(data: bytes) -> None:
    """Pass on the console's output."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def check_requests(mirror: WebServer) -> None:
    """Compare the mirror's requests with those of an installer."""
    assert {request.client for request in mirror.requests} == {GUEST}
    got = {request.path for request in mirror.requests if request.status == 200}
    drivers = [path for path in got if path.startswith("/debian/pool/ext4-modules-")]
    assert f"/debian/dists/{installer.SUITE}/Release" in got, got
    assert len(drivers) == 1, got
    print(f"the mirror was asked for {len(got)} files by {GUEST}", flush=True)


def check_disk(disk: Path, raw: Path) -> None:
    """Check the partition and the file system in it."""
    installed.run("qemu-img", "check", "-q", "-f", "qcow2", disk)
    installed.create("-i", disk, f"raw:{raw}")
    (partition,) = json.loads(installed.run("sfdisk", "--json", raw))["partitiontable"][
        "partitions"
    ]
    place = f"{raw}?offset={partition['start'] * _SECTOR}"
    installed.run("e2fsck", "-fn", place)
    shown = installed.run("debugfs", "-R", f"cat /{installer.MARK}", place)
    assert shown.strip() == NAME, shown
    print("e2fsck and qemu-img: clean", flush=True)


def main() -> int:
    """Run it once."""
    with tempfile.TemporaryDirectory(prefix="installer-", dir="/dev/shm") as directory:
        try:
            install(Path(directory))
        except (AssertionError, OSError) as error:
            print(f"installer: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
