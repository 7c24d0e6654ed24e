"""Names of files that a hostile user could use, in a directory that the user can enter."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

USER = 65534
GROUP = 65534
_CONTENTS = b"contents".ljust(4096, b".")
_ACL = struct.Struct("<HHI")
_ACL_VERSION = struct.pack("<I", 2)
# Tags of entries: owner, a user, group, mask, others.
_USER_OBJ, _A_USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 16, 32
_NOBODY = 0xFFFF_FFFF


class Tree:
    """The files, and their properties."""

    def __init__(self, root: Path) -> None:
        """Start in `root`, which every user can search."""
        self.root = root
        self.mounts: list[Path] = []
        self.sockets: list[socket.socket] = []

    def close(self) -> None:
        """Remove mounts and other things that are no files."""
        for mount in self.mounts:
            # A process that was killed while it swapped mounts may have left another one there.
            while str(mount) in Path("/proc/self/mountinfo").read_text().split():
                subprocess.run(["umount", "-l", str(mount)], check=True)
        for each in self.sockets:
            each.close()

    def file(self, name: str | bytes, mode: int = 0o600, owner: int = USER, group: int = 0) -> str:
        """Make a file."""
        path = os.path.join(os.fsencode(self.root), os.fsencode(name))  # noqa: PTH118 - bytes
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
        os.write(fd, _CONTENTS)
        os.fchown(fd, owner, group)
        os.fchmod(fd, mode)
        os.close(fd)
        return os.fsdecode(path)

    def link(self, target: str) -> str:
        """Make a symbolic link."""
        path = self.root / f"link{len(list(self.root.iterdir()))}"
        path.symlink_to(target)
        return str(path)


def openable(tree: Tree) -> Iterator[str]:
    """Yield names that the kernel decides about: the user's own open gives the expected result."""
    for owner, group in ((USER, 0), (0, GROUP), (0, 0)):
        for bits in range(0, 0o1000, 0o11 if owner else 0o22):
            yield tree.file(f"m{owner}-{group}-{bits:o}", bits, owner, group)
    own, secret = tree.file("own"), tree.file("secret", 0o600, 0)
    for target in (own, secret, str(tree.root / "nothing"), str(tree.root)):
        yield tree.link(target)
        yield tree.link(tree.link(target))
        hard = tree.root / f"hard{len(list(tree.root.iterdir()))}"
        if Path(target).is_file():
            hard.hardlink_to(target)
            yield str(hard)
    yield from _of_directories(tree)
    yield from _of_lists(tree)
    yield from _names(tree, own)
    yield from _mounts(tree, own)
    target = own
    for _ in range(45):
        target = tree.link(target)
        yield target
    loop = tree.root / "loop"
    loop.symlink_to(loop)
    yield str(loop)


def _of_directories(tree: Tree) -> Iterator[str]:
    for mode in (0o700, 0o711, 0o755, 0o744, 0o000):
        for owner in (0, USER):
            home = tree.root / f"home{mode:o}-{owner}"
            home.mkdir()
            inner = home / "inner"
            inner.mkdir(mode=0o711)
            for parent in (home, inner):
                path = tree.file(f"{parent.relative_to(tree.root)}/file", 0o666, 0)
                yield path
                yield tree.link(path)
                yield f"{parent}/missing"
            yield f"{home}/inner/../file"
            yield f"{home}/inner/./../inner//file"
            home.chmod(mode)
            os.chown(home, owner, 0)


def _of_lists(tree: Tree) -> Iterator[str]:
    """Access control lists that grant more than the mode, and less."""
    for mode in (0o600, 0o644, 0o666):
        for allowed in (0, 4, 6):
            path = tree.file(f"acl{mode:o}-{allowed}", mode, 0)
            entries = (
                (_USER_OBJ, 6, _NOBODY),
                (_A_USER, allowed, USER),
                (_GROUP_OBJ, mode >> 3 & 7, _NOBODY),
                (_MASK, 6, _NOBODY),
                (_OTHER, mode & 7, _NOBODY),
            )
            data = _ACL_VERSION + b"".join(_ACL.pack(*each) for each in entries)
            try:
                os.setxattr(path, "system.posix_acl_access", data)
            except OSError:  # the file system has none
                continue
            yield path


def _names(tree: Tree, own: str) -> Iterator[str]:
    for name in (
        *("new\nline", "esc\x1b[31mape", "tab\t", " ", "-d", "a,b", "raw:x", "\u202etxt"),
        *("x" * 255, "\r", "\x7f", "\u00e9" * 127),
    ):
        yield tree.file(name)
    for raw in (b"\xff\xfe", b"\x80latin", "\U0010ffff\U0010ffff\x80".encode()):
        yield tree.file(raw)
        yield tree.link(tree.file(raw + b"2", 0o600, 0))
    yield str(tree.root / ("y" * 256))
    for length in (4000, 4094, 4095, 4096, 5000):
        filler = "/." * ((length - len(own)) // 2)
        head, _, tail = own.rpartition("/")
        yield f"{head}{filler}/{tail}"
    for path in ("", ".", "/", "..", "nowhere/at/all", f"{own}/", f"{own}/.", f"{own}\0", "\0"):
        yield path
    for path in ("/etc/shadow", "/etc/passwd", "/root/.bashrc"):
        yield path
    yield os.fsdecode(b"//" + os.fsencode(own))


def _mounts(tree: Tree, own: str) -> Iterator[str]:
    for name, options in (("plain", ""), ("ro", "ro"), ("noexec", "noexec")):
        place = tree.root / f"mount-{name}"
        place.mkdir()
        source = tree.root / f"source-{name}"
        source.mkdir(mode=0o755)
        tree.file(f"source-{name}/file", 0o666)
        bound = subprocess.run(["mount", "--bind", str(source), str(place)], check=False)
        if bound.returncode:
            continue
        tree.mounts.append(place)
        if options:
            command = ["mount", "-o", f"remount,bind,{options}", str(place)]
            subprocess.run(command, check=True)
        yield str(place / "file")
        yield tree.link(str(place / "file"))
        single = Path(tree.file(f"single-{name}", 0o666))
        if subprocess.run(["mount", "--bind", own, str(single)], check=False).returncode == 0:
            tree.mounts.append(single)
            yield str(single)


def closed(tree: Tree, fds: list[int]) -> Iterator[str]:
    """Yield names that may never be opened for a user, whatever the kernel would let the user do.

    `fds` are descriptors of this process: a deleted file's, memory's.
    """
    pids = (os.getpid(), 1, "self", "thread-self")
    direct = [f"/proc/{pid}/fd/{fd}" for pid in pids for fd in (*fds, 0, 1, 2)]
    direct += [f"/dev/fd/{fd}" for fd in (*fds, 0, 1, 2)]
    direct += ["/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/null", "/dev/zero", "/dev/full"]
    direct += [f"/proc/{pid}/{name}" for pid in pids for name in ("exe", "cwd", "root", "mem")]
    direct += [f"/proc/{pid}/root/etc/passwd" for pid in pids]
    direct += [f"/proc/{pid}/ns/{name}" for pid in pids for name in ("mnt", "net", "user")]
    direct += [f"/proc/{pid}/cwd/pyproject.toml" for pid in pids]
    direct += ["/proc/version", "/proc/sys/kernel/hostname", "/proc/kcore", "/proc/sysrq-trigger"]
    direct += ["/proc/self/maps", "/proc/self/environ", "/proc/kmsg", "/sys/power/state"]
    direct += ["/sys/kernel/uevent_helper", "/dev/kmsg", "/dev/kvm", "/dev/net/tun", "/dev/ptmx"]
    direct += ["/dev/tty", "/dev/random", "/dev/mem", "/dev/loop-control", "/dev/fuse"]
    direct += ["\ud800"]
    direct += [f"{tree.root}", f"{tree.root}/", "/tmp", "/dev/pts/0"]
    listening = socket.socket(socket.AF_UNIX)
    tree.sockets.append(listening)
    place = tree.root / "socket"
    listening.bind(str(place))
    place.chmod(0o666)
    direct.append(str(place))
    for number, kind in enumerate((stat.S_IFIFO, stat.S_IFCHR)):
        node = tree.root / f"node{number}"
        os.mknod(node, kind | 0o666, os.makedev(1, 3))
        node.chmod(0o666)
        direct.append(str(node))
    for path in direct:
        yield path
        if not any(0xD800 <= ord(char) <= 0xDFFF for char in path):
            yield tree.link(path)
