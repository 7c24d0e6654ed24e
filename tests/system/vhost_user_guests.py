"""Guests of QEMU that use a disk by vhost-user: a boot sector, and a Debian kernel."""

from __future__ import annotations

from pathlib import Path

from tests import artifacts

SECTOR = 512
BOOT_MESSAGE = b"booted from vhost-user\r\n"

_BOOT_CODE = b"".join(
    (
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("b80102"),  # mov $0x0201, %ax: read one sector
        bytes.fromhex("b90200"),  # mov $2, %cx: the second
        bytes.fromhex("b600"),  # mov $0, %dh; the BIOS has put the drive into %dl
        bytes.fromhex("bb007e"),  # mov $0x7e00, %bx
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("fa"),  # cli: the BIOS would take what is typed
        bytes.fromhex("be007e"),  # mov $0x7e00, %si
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("ac"),  # 1: lodsb
        bytes.fromhex("84c0"),  # test %al, %al
        bytes.fromhex("7403"),  # jz 2f
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("ebf8"),  # jmp 1b
    )  # 2:
)
_ECHO_CODE = b"".join(
    (
        bytes.fromhex("bafd03"),  # 1: mov $0x3fd, %dx
        bytes.fromhex("ec"),  # in %dx, %al
        bytes.fromhex("a801"),  # test $1, %al
        bytes.fromhex("74f8"),  # jz 1b
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("ec"),  # in %dx, %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("3c72"),  # cmp $'r', %al
        bytes.fromhex("7504"),  # jne 2f
        bytes.fromhex("b0fe"),  # mov $0xfe, %al
        bytes.fromhex("e664"),  # out %al, $0x64: reset
        bytes.fromhex("3c71"),  # 2: cmp $'q', %al
        bytes.fromhex("75e7"),  # jne 1b
    )
)
_END_CODE = b"".join(
    (
        bytes.fromhex("b010"),  # mov $0x10, %al
        bytes.fromhex("e6f4"),  # out %al, $0xf4: isa-debug-exit
        bytes.fromhex("f4"),  # hlt
    )
)
BOOT_STATUS = 0x10 << 1 | 1
_BOOT_DISK_SIZE = 1 << 20  # the BIOS needs at least a cylinder


def boot_disk(*, waits: bool = False) -> bytes:
    """Return a disk whose boot sector prints the text of the second sector, and ends the VM.

    With `waits` it first echoes typed letters; q ends the VM, and r reboots it.
    """
    code = _BOOT_CODE + (_ECHO_CODE if waits else b"") + _END_CODE
    first = code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    return (first + BOOT_MESSAGE).ljust(_BOOT_DISK_SIZE, b"\0")


_WRITE_CODE = b"".join(
    (
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("b80102"),  # mov $0x0201, %ax: read one sector
        bytes.fromhex("b90200"),  # mov $2, %cx: the second
        bytes.fromhex("b600"),  # mov $0, %dh; the BIOS has put the drive into %dl
        bytes.fromhex("bb007e"),  # mov $0x7e00, %bx
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("b80103"),  # mov $0x0301, %ax: write one sector
        bytes.fromhex("b90100"),  # mov $1, %cx: the first
        bytes.fromhex("b600"),  # mov $0, %dh
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("b077"),  # mov $'w', %al
        bytes.fromhex("7302"),  # jnc 1f
        bytes.fromhex("b072"),  # mov $'r', %al
        bytes.fromhex("ee"),  # 1: out %al, %dx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("f4"),  # hlt
    )
)
HAS_WRITTEN, WAS_REFUSED = b"=w=", b"=r="


def overwriting_disk(sector: bytes) -> bytes:
    """Return a disk whose boot sector writes `sector` over itself, and reports the result."""
    first = _WRITE_CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    return (first + sector.ljust(SECTOR, b"\0")).ljust(_BOOT_DISK_SIZE, b"\0")


# Its output is the tests' expectation, in this order. The disk is 16 MiB or larger.
_DISK_INIT = """#!/bin/busybox sh
echo "init: up"
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do
    insmod "$module" || echo "init: cannot load $module"
done
waited=0
while [ ! -b /dev/vda ] && [ $waited -lt 100 ]; do
    sleep 0.1
    waited=$((waited + 1))
done
cd /sys/block/vda
echo "disk: size $(cat size) ro $(cat ro) serial $(cat serial) queues $(ls mq | wc -l)"
cd /
if [ "$test" = again ]; then
    if [ "$(dd if=/dev/vda bs=5 count=1 2>/dev/null)" = again ]; then
        echo "disk: end"
        poweroff -f
    fi
    echo again | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
    reboot -f
fi
if [ "$test" = crash ]; then
    dd if=/dev/urandom of=/random bs=64k count=64 2>/dev/null
    echo "disk: writing"
    for part in 0 1 2 3; do
        dd if=/random of=/dev/vda bs=4k seek=$((1024 * (part % 3))) oflag=direct 2>/dev/null
    done
    for part in 0 1 2; do
        cmp -n 4194304 /random /dev/vda 0 $((4194304 * part)) && echo "disk: same yes"
    done
    echo "disk: end"
    poweroff -f
fi
sum() { dd if=$1 bs=64k count=64 $2 2>/dev/null | md5sum | cut -d ' ' -f 1; }
echo "disk: first $(dd if=/dev/vda bs=16 count=1 2>/dev/null)"
if [ "$(cat /sys/block/vda/ro)" = 0 ]; then
    dd if=/dev/urandom of=/random bs=64k count=64 2>/dev/null
    dd if=/random of=/dev/vda bs=64k seek=64 oflag=direct conv=fsync 2>/dev/null
    echo "disk: same $([ $(sum /dev/vda 'skip=64 iflag=direct') = $(sum /random) ] && echo yes)"
    # Many requests at once, from several processes, through the page cache.
    for part in 0 1 2 3; do
        dd if=/random of=/dev/vda bs=16k seek=$((512 + 64 * part)) skip=$((64 * part)) \\
            count=64 conv=notrunc 2>/dev/null &
    done
    wait
    sync
    echo 3 > /proc/sys/vm/drop_caches
    echo "disk: same $([ $(sum /dev/vda skip=128) = $(sum /random) ] && echo yes)"
    blkdiscard -z -o 4194304 -l 65536 /dev/vda || blkdiscard -o 4194304 -l 65536 /dev/vda
    echo "disk: zeroes $(dd if=/dev/vda bs=64k skip=64 count=1 2>/dev/null | tr -d '\\0' | wc -c)"
else
    dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null || echo "disk: refused"
fi
dmesg -r | grep '^<[0-3]>' | sed 's/^/disk: dmesg /'
echo "disk: end"
poweroff -f
"""


def disk_initramfs(kernel: artifacts.Kernel) -> Path:
    """Return an initramfs whose /init exercises /dev/vda and prints the results."""
    modules = kernel.modules(("virtio_pci", "virtio_blk"))
    return artifacts._initramfs(f"vhost-user-{kernel.release}", modules, _DISK_INIT)
