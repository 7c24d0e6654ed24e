"""Files that `vmctl start` opens, and passes open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from vmctl.line.cli import main as vmctl
from vmd.wire.messages import Start, Started
from vmd.wire.parts import DiskRequest, ShareRequest
from vmm_kvm.images.create import create_qcow2
from vmm_kvm.limits import SHARES_MAX

STARTED = Started(id=7, pid=700, tty="/dev/pts/7")


def test_start_sends_every_file_of_a_disk(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image is sent with its bases, even if a name is no text; a missing one is reported."""
    create_qcow2(str(tmp_path / "base"), 1 << 20)
    image = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.qcow2")
    create_qcow2(image, 1 << 20, "base")
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", "-d", image, "-i", "1", "web"]) == 0
    (request,) = daemon.requests
    assert isinstance(request, Start)
    assert request.disks == (DiskRequest(path=f"{tmp_path}/\\xff.qcow2", chain=(0, 1)),)
    assert daemon.fd_counts == [2]
    (tmp_path / "base").unlink()
    capsys.readouterr()
    assert vmctl(["start", "-d", image, "-i", "1", "web"]) == 1
    assert capsys.readouterr().err == (
        f"vmctl: cannot open base image '{tmp_path}/base': No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [
        ("{0}", "{0}", True),
        ("{0}", "{1}", True),
        ("raw:{0}", "{0},ro", True),
        ("{0},ro", "raw:{1},ro", False),
    ],
)
def test_start_refuses_the_same_disk_twice(
    *,
    first: str,
    second: str,
    is_refused: bool,
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same disk twice, also by a link, is refused here; readers may share an image."""
    image, link = tmp_path / "disk.img", tmp_path / "link"
    image.write_bytes(bytes(1 << 20))
    link.symlink_to(image)
    daemon = serve(lambda _: [STARTED])
    disks = [text.format(image, link) for text in (first, second)]
    status = vmctl(["start", "-d", disks[0], "-d", disks[1], "-i", "1", "web"])
    assert (status, len(daemon.requests)) == ((1, 0) if is_refused else (0, 1))
    if is_refused:
        assert capsys.readouterr().err == f"vmctl: {image}: the same disk twice\n"


def test_a_snapshot_is_only_read(serve: Serve, tmp_path: Path) -> None:
    """The daemon gets a throw-away disk's image by a descriptor that cannot write."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o444)
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", "-d", f"raw:{image},snapshot", "-i", "1", "web"]) == 0
    (request,) = daemon.requests
    assert isinstance(request, Start)
    wanted = DiskRequest(path=str(image), chain=(0,), format="raw", is_snapshot=True)
    assert request.disks == (wanted,)


def test_start_opens_the_directories_of_shares(serve: Serve, tmp_path: Path) -> None:
    """Each is sent open, under its real path; it is written to unless that is refused."""
    (tmp_path / "src").mkdir()
    (tmp_path / "link").symlink_to("src")
    daemon = serve(lambda _: [STARTED])
    shares = ("--share", f"{tmp_path}/link:/src:ro", "--share", f"{tmp_path}:all")
    assert vmctl(["start", "--selftest", *shares, "web"]) == 0
    (request,) = daemon.requests
    assert isinstance(request, Start)
    assert request.shares == (
        ShareRequest(path=f"{tmp_path}/src", tag="/src", directory=0, is_read_only=True),
        ShareRequest(path=str(tmp_path), tag="all", directory=1),
    )
    assert daemon.fd_counts == [3]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        (("{0}",), "invalid share: {0}: not directory:tag"),
        (("{0}:a", "{0}:a:ro"), "two shares have the tag a"),
        (("{0}/none:a",), "invalid share path: {0}/none: No such file or directory"),
        (("{0}/file:a",), "cannot open share '{0}/file': Not a directory"),
        (("vhost-user:s:a",), "invalid share: vhost-user:s:a: only for 'vmctl run' and vm.conf"),
        (tuple(f"{{0}}:{at}" for at in range(SHARES_MAX + 1)), "too many shares"),
    ],
)
def test_start_refuses_what_cannot_be_shared(
    shares: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says why; no daemon is asked."""
    (tmp_path / "file").touch()
    words = [word for one in shares for word in ("--share", one.format(tmp_path))]
    assert vmctl(["start", "--selftest", *words, "web"]) == 1
    assert capsys.readouterr().err == f"vmctl: {told.format(tmp_path)}\n"
