"""A guest whose root is this host's, by virtio-fs: its kernel, its modules, its initramfs.

The initramfs has the modules that the kernel needs to reach its root, and a program of ours that
loads them, mounts the root, and executes the agent there. Nothing of it comes from the host's
programs: no shell is needed before the root is there.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst;
Documentation/filesystems/{virtiofs,overlayfs}.rst
"""

import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vmctl.foreground.boot_program import RESULT, Call, assemble
from vmm_kvm.errors import SpecError

ROOT_TAG = "root"
MODULES = ("virtio_pci", "virtiofs", "overlay", "vmw_vsock_virtio_transport")
"""Modules that a kernel needs, unless it has them built in."""

_VERSION_AT, _VERSION_MAX = 0x20E, 256  # the Linux/x86 boot protocol, "kernel_version"
_SETUP_START = 0x200
_SIGNATURE_AT, _SIGNATURE = 0x202, b"HdrS"
_DIRECTORIES = ("dev", "lower", "rw", "root", "modules")
_HOST_NAME = b"vmctl"
_LOOPBACK_UP = struct.pack("<16sH", b"lo", 1) + bytes(22)  # struct ifreq: IFF_UP

# arch/x86/entry/syscalls/syscall_64.tbl
_WRITE, _OPEN, _IOCTL, _SOCKET, _EXECVE, _CHDIR, _MKDIR, _SYMLINK = 1, 2, 16, 41, 59, 80, 83, 88
_CHROOT, _MOUNT, _REBOOT, _SETHOSTNAME, _FINIT_MODULE = 161, 165, 169, 170, 313
_O_CLOEXEC = 0x80000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_MOVE = 1, 2, 4, 8, 8192
_SIOCSIFFLAGS = 0x8914
_MAGIC1, _MAGIC2, _POWER_OFF = 0xFEE1DEAD, 672274793, 0x4321FEDC
_QUIET = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC


class Kernel(NamedTuple):
    """A kernel, and files of modules in the order in which they are loaded."""

    path: Path
    modules: tuple[Path, ...]


def find_kernel(path: str | None) -> Kernel:
    """Return the kernel at `path`, or the running one, with what it needs.

    Raises:
        SpecError: it is not there, or its modules are not.
    """
    if path is None:
        return _running()
    image = Path(path)
    version = _version_of(image)
    if version is None:
        return Kernel(image, ())
    near = image.absolute().parent
    folders = (
        *(near, near / "lib/modules" / version, near.parent / "lib/modules" / version),
        *(near.parent / "usr/lib/modules" / version, Path("/lib/modules") / version),
    )
    return Kernel(image, _modules_in(folders))


def _running() -> Kernel:
    version = os.uname().release
    folder = Path("/lib/modules") / version
    images = (Path(f"/boot/vmlinuz-{version}"), folder / "vmlinuz")
    for image in images:
        if image.is_file():
            return Kernel(image, _modules_in((folder,)))
    raise SpecError(f"no image of the running kernel, {images[0]}: name a kernel with -b")


def _version_of(image: Path) -> str | None:
    """Return the release of a bzImage; None for another kernel, which says none."""
    try:
        with image.open("rb") as file:
            head = file.read(_SETUP_START + 4 * 0x10000)
    except OSError as err:
        raise SpecError(f"{image}: {err.strerror}") from err
    if head[_SIGNATURE_AT : _SIGNATURE_AT + len(_SIGNATURE)] != _SIGNATURE:
        return None
    at = _SETUP_START + int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little")
    words = head[at : at + _VERSION_MAX].partition(b"\0")[0].split()
    version = words[0].decode(errors="replace") if words else ""
    return version if re.fullmatch(r"[\w.+~-]+", version) else None


def _modules_in(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Return what has to be loaded, from the first folder that has modules.

    A kernel without any has all built in, or says itself what is missing.
    """
    for folder in folders:
        table = folder / "modules.dep"
        if table.is_file():
            return tuple(folder / name for name in load_order(table.read_text(), MODULES))
    return ()


def load_order(table: str, wanted: Sequence[str]) -> list[str]:
    """Return files of modules, each behind those that it depends on.

    `table` is a modules.dep, in which each line names a file and then what it needs, the last one
    first. What it does not name is built in.
    """
    needs = {}
    for line in table.splitlines():
        name, _, others = line.partition(":")
        needs[_module_name(name)] = [*reversed(others.split()), name]
    order: dict[str, None] = {}
    for name in wanted:
        order.update(dict.fromkeys(needs.get(name, ())))
    return list(order)


def _module_name(file: str) -> str:
    return Path(file).name.partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    """Return a module as the kernel takes it.

    Raises:
        SpecError: it cannot be read, or unpacked.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            import lzma  # noqa: PLC0415 - as the distribution packs them

            return lzma.decompress(data)
        if path.suffix == ".gz":
            import gzip  # noqa: PLC0415 - the same

            return gzip.decompress(data)
        if path.suffix == ".zst":
            import zstandard  # noqa: PLC0415 - the same

            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as err:
        raise SpecError(f"{path}: {err}") from err
    return data


def initramfs(kernel: Kernel, agent: Path, *, is_writable: bool) -> bytes:
    """Return an initramfs whose program executes the agent on this host's root.

    Raises:
        SpecError: a module cannot be read.
    """
    modules = [_module(path) for path in kernel.modules]
    program = assemble(list(_calls(len(modules), agent, is_writable=is_writable)))
    archive = b"".join(_entry(name, stat.S_IFDIR | 0o755) for name in _DIRECTORIES)
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("init", stat.S_IFREG | 0o755, program)
    for number, module in enumerate(modules):
        archive += _entry(_place(number), stat.S_IFREG | 0o644, module)
    return archive + _entry("TRAILER!!!", 0)


def _place(number: int) -> str:
    return f"modules/{number:02}.ko"


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Return an entry of a newc archive."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    entry = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    entry += bytes(-len(entry) % 4) + data
    return entry + bytes(-len(entry) % 4)


def _calls(modules: int, agent: Path, *, is_writable: bool) -> Iterator[Call]:
    for number in range(modules):
        yield Call(_OPEN, (f"/{_place(number)}".encode(), _O_CLOEXEC, 0))
        yield Call(_FINIT_MODULE, (RESULT, b"", 0))
    if is_writable:
        yield _mount(ROOT_TAG, "/root", "virtiofs")
    else:
        yield _mount(ROOT_TAG, "/lower", "virtiofs", _MS_RDONLY)
        yield _mount("tmpfs", "/rw", "tmpfs", 0, "mode=755")
        yield Call(_MKDIR, (b"/rw/upper", 0o755))
        yield Call(_MKDIR, (b"/rw/work", 0o755))
        options = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"
        yield _mount("overlay", "/root", "overlay", 0, options)
    yield Call(_CHDIR, (b"/root",))
    yield _mount(".", "/", "", _MS_MOVE)
    yield Call(_CHROOT, (b".",))
    yield Call(_CHDIR, (b"/",))
    yield _mount("proc", "/proc", "proc", _QUIET)
    yield _mount("sysfs", "/sys", "sysfs", _QUIET)
    yield _mount("devtmpfs", "/dev", "devtmpfs", _MS_NOSUID)
    for name in (b"/dev/pts", b"/dev/shm"):
        yield Call(_MKDIR, (name, 0o755))
    yield _mount("devpts", "/dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "mode=620,ptmxmode=666")
    yield _mount("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV)  # noqa: S108 - the same
    yield _mount("tmpfs", "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for number, stream in enumerate((b"", b"/dev/stdin", b"/dev/stdout", b"/dev/stderr")):
        target = b"/proc/self/fd/%d" % (number - 1) if number else b"/proc/self/fd"
        yield Call(_SYMLINK, (target, stream or b"/dev/fd"))
    yield Call(_SETHOSTNAME, (_HOST_NAME, len(_HOST_NAME)))
    yield Call(_SOCKET, (socket.AF_INET, socket.SOCK_DGRAM | _O_CLOEXEC, 0))
    yield Call(_IOCTL, (RESULT, _SIOCSIFFLAGS, _LOOPBACK_UP))
    python = os.fsencode(os.path.realpath(sys.executable))
    path = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    yield Call(
        _EXECVE,
        (python, (python, b"-I", os.fsencode(agent)), (path, b"HOME=/root", b"LANG=C.UTF-8")),
    )
    message = b"vmctl: the guest cannot execute " + python + b" of its root\n"
    yield Call(_WRITE, (2, message, len(message)))
    yield Call(_REBOOT, (_MAGIC1, _MAGIC2, _POWER_OFF))


def _mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> Call:
    words = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    return Call(_MOUNT, words)
