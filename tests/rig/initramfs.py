"""Build the initramfs images of guests and of the rig: static busybox, modules, one script.

An image is a pure function of its parts: no time stamps, no owner, entries in a fixed order.
Kernel modules go to `/modules`, uncompressed and numbered in load order.
Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst (newc).
"""

from __future__ import annotations

import hashlib
import lzma
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The script reports before it does anything else: benchmarks stop their clock at this line.
# The kernel passes unknown words of its command line (`test=poweroff`) to /init as
# environment variables. busybox's dmesg has no --level, so raw priorities are filtered.
GUEST_INIT = """#!/bin/busybox sh
echo "init: up"
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do
    [ -e "$module" ] && { insmod "$module" || echo "init: cannot load $module"; }
done
report() {
    dmesg -n 1
    echo "report: nproc $(nproc)"
    echo "report: memory $(free -k | awk '/^Mem:/ { print $2 }')"
    echo "report: release $(uname -r)"
    ram=0
    for range in /sys/firmware/memmap/*; do
        [ "$(cat $range/type)" = "System RAM" ] || continue
        ram=$((ram + $(cat $range/end) - $(cat $range/start) + 1))
    done
    echo "report: ram $ram"
    dmesg -r | grep '^<[0-4]>' | sed 's/^/report: dmesg /'
    echo "report: end"
}
button() {
    for event in /dev/input/event*; do
        name=$(cat "/sys/class/input/${event##*/}/device/name")
        [ "$name" = "Power Button" ] || continue
        # Only who has it open gets an event: open it before anyone is told to press.
        exec 3<"$event"
        {
            dd of=/dev/null bs=24 count=1 2>/dev/null <&3
            echo "init: power button"
            poweroff -f
        } &
    done
    echo "init: waiting for the button"
    while :; do sleep 1000; done
}
case "$test" in
    poweroff) poweroff -f ;;
    reboot) reboot -f ;;
    panic) echo c > /proc/sysrq-trigger ;;
    report) report; poweroff -f ;;
    button) button ;;
    idle) echo "init: idle"; while :; do sleep 1000; done ;;
    *) setsid cttyhack sh; poweroff -f ;;
esac
"""

# The rig's root: this machine's file system by 9p, read-only, under a scratch layer.
RIG_INIT = """#!/bin/busybox sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do
    insmod "$module" 2>/dev/null || echo "rig: cannot load $module"
done
mkdir -p /new /ro /rw
options=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $options,cache=loose,ro root /ro || exec poweroff -f
mount -t tmpfs -o size=90% tmpfs /rw
mkdir -p /rw/upper /rw/work
mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /new
for folder in dev proc sys; do mount --move /$folder /new/$folder; done
mount -t tmpfs tmpfs /new/run
mkdir -p /new/run/rig /new/run/threads /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs -o size=90% tmpfs /new/dev/shm
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup 2>/dev/null
mount -t 9p -o $options,cache=none out /new/run/rig
mount -t 9p -o $options,cache=none,ro threads /new/run/threads
exec switch_root /new /run/rig/main
"""

RIG_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng"),
    *("9pnet_virtio", "9p", "overlay", "loop", "ext4"),
    *("kvm_amd", "tun", "bridge", "veth", "vhost_net", "vhost_vsock"),
    *("nf_tables", "nft_masq", "nft_nat", "nft_chain_nat", "nft_ct"),
    *("nft_fib_inet", "vrf", "8021q"),
)

_FOLDERS = ("bin", "dev", "modules", "proc", "sys")


def newc_entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    """Return one archive member: header, name and data, each padded to 4 bytes.

    Args:
        inode: number of the member in its archive; 1 or more.
        name: path without a leading slash.
        mode: file type and permissions, as `stat.S_IF*` with permission bits.
        data: the file's bytes, or a symbolic link's target.

    Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    raw = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def archive(busybox: Path, applets: Sequence[str], modules: Sequence[Path], init: str) -> bytes:
    """Return the uncompressed newc archive.

    Args:
        busybox: a statically linked busybox.
        applets: names that become symbolic links to it in /bin.
        modules: module files in load order; `.ko.xz` is unpacked.
        init: text of /init.
    """
    members: list[tuple[str, int, bytes]] = [
        (folder, stat.S_IFDIR | 0o755, b"") for folder in _FOLDERS
    ]
    members.append(("init", stat.S_IFREG | 0o755, init.encode()))
    members.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    members += [
        (f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
        for applet in applets
        if applet != "busybox"
    ]
    for number, module in enumerate(modules):
        name = module.name.removesuffix(".xz")
        data = module_data(module)
        members.append((f"modules/{number:03}-{name}", stat.S_IFREG | 0o644, data))
    entries = [newc_entry(number, *member) for number, member in enumerate(members, start=1)]
    return b"".join(entries) + newc_entry(0, "TRAILER!!!", 0, b"")


def module_data(module: Path) -> bytes:
    """Return a module's bytes; `.ko.xz` is unpacked."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def build(busybox: Path, modules: Sequence[Path], init: str) -> bytes:
    """Return the image, compressed by zstd, which every kernel since 5.9 unpacks.

    Raises:
        subprocess.CalledProcessError: busybox or zstd failed.
    """
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    packed = subprocess.run(
        ["zstd", "-q", "-19", "--stdout"],
        check=True,
        capture_output=True,
        input=archive(busybox, listed.stdout.split(), modules, init),
    )
    return packed.stdout


def recipe(busybox: Path, modules: Sequence[Path], init: str) -> str:
    """Return a short name for the image that this version of `build` makes of these parts."""
    code = Path(__file__).read_text()
    parts = [code, init, str(busybox.stat().st_size), *(str(module) for module in modules)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
