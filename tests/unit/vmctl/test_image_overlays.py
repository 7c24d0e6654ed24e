"""Disks that other users have made on images of root's store: these stay."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.system.vmd.users import USER, being
from vmctl.images import store as module
from vmctl.images.store import ImageStore, note_overlay
from vmm_kvm.images.create import create_qcow2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has a store for all")

DIGEST = f"sha256-{'0' * 64}"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of a user's, beside a store of root's that has one image."""
    with TemporaryDirectory(prefix="vmctl-") as name:
        top = Path(name)
        top.chmod(0o711)
        monkeypatch.setenv("VMCTL_IMAGES", f"{name}/store")
        monkeypatch.setattr(module, "_SYSTEM", f"{name}/store")
        with ImageStore().locked():
            create_qcow2(f"{name}/store/{DIGEST}", 1 << 20)
        home = top / "home"
        home.mkdir()
        os.chown(home, USER, USER)
        yield home


def _made(folder: Path, name: str) -> Path:
    """Make an overlay, as a user who may not write to the store."""
    path, base = folder / name, f"{folder.parent}/store/{DIGEST}"
    with being(USER):
        create_qcow2(str(path), 1 << 20, base=base)
        note_overlay(base, str(path))
    return path


def test_an_image_stays_for_another_user(folder: Path) -> None:
    """As long as the disk is there; the user can neither list nor remove what others noted."""
    store = ImageStore()
    assert store.user(DIGEST) == ""
    overlay = _made(folder, "disk.qcow2")
    notes = folder.parent / "store" / "overlays-of-others"
    (note,) = notes.iterdir()
    assert (notes.stat().st_uid, stat.S_IMODE(notes.stat().st_mode)) == (0, 0o1733)
    with being(USER), pytest.raises(PermissionError):
        list(notes.iterdir())
    assert store.user(DIGEST) == f"{overlay} is an overlay on it, of user {USER}"
    overlay.unlink()
    assert store.user(DIGEST) == ""
    assert not note.exists()


def test_what_a_user_may_note(folder: Path) -> None:
    """Nothing but regular files of that user's is opened, and nothing that is odd is an error."""
    store, notes = ImageStore(), folder.parent / "store" / "overlays-of-others"
    overlay = _made(folder, "disk.qcow2")
    for note in notes.iterdir():
        note.unlink()
    os.chown(overlay, 1, 1)  # it is another's now
    (folder / "link").symlink_to(overlay)
    os.mkfifo(folder / "fifo")
    paths = (overlay, folder / "link", folder / "fifo", folder, "/dev/null", "/etc/passwd")
    texts = [os.fsencode(path) for path in paths] + [b"", b"relative", b"/a\0b", b"/" * 9000]
    for number, text in enumerate(texts):
        note = notes / str(number)
        note.write_bytes(text)
        os.chown(note, USER, USER)
    (notes / "link").symlink_to(overlay)
    (notes / "folder").mkdir()
    os.mkfifo(notes / "fifo")
    assert store.user(DIGEST) == ""
    os.chown(overlay, USER, USER)
    assert store.user(DIGEST).startswith(f"{overlay} is an overlay on it")
