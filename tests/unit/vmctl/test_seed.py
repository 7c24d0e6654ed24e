"""The seed of `--cloud-init`, `--ssh-key` and `--agent`, read back by xorriso and email."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.agents import AGENT
from tests.unit.vmctl.conftest import Serve
from tests.vmctl_driver import VMCTL
from vmctl.daemon.start import start
from vmctl.images.seed import seed_disk
from vmd.wire.messages import AnyRequest, Start, Started
from vmm_kvm.errors import SpecError
from vmm_kvm.images.iso9660 import SECTOR, iso_image

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFrikGGJGsPSsM+ivZDCFUk7O2IwRWV5TugyENb26I8z me@here"


class Options(NamedTuple):
    """The words of a command line."""

    cloud_init: tuple[str, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    agent: bool = False
    vsock: tuple[str, ...] = ("auto",)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "vmm-kvm" / "seeds"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A public key's file."""
    (tmp_path / "key.pub").write_text(f"# mine\n{KEY}\n")
    return tmp_path / "key.pub"


def seed(options: Options, name: str = "web") -> Path:
    """Return the seed of a VM."""
    disk = seed_disk(name, options)
    assert disk.startswith("raw:")
    assert disk.endswith(".iso,ro")
    return Path(disk.removeprefix("raw:").removesuffix(",ro").replace(",,", ","))


def xorriso(image: Path, *commands: str | Path) -> str:
    """Return what xorriso says of an image."""
    program = shutil.which("xorriso")
    if program is None:
        pytest.skip("xorriso is not installed")
    words = [program, "-abort_on", "SORRY", "-indev", f"stdio:{image}", *commands]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def unpacked(image: Path, folder: Path) -> dict[str, bytes]:
    """Return the files of an image."""
    target = folder / f"files-{image.name}"
    assert "Volume id    : 'cidata'" in xorriso(image, "-pvd_info")
    xorriso(image, "-osirrox", "on", "-extract", "/", target)
    subprocess.run(["chmod", "-R", "u+w", target], check=True)
    return {str(path.relative_to(target)): path.read_bytes() for path in target.iterdir()}


def parts(data: bytes) -> list[tuple[str, str]]:
    """Return the kinds and the texts of a MIME message's parts."""
    found = []
    for part in email.message_from_bytes(data).walk():
        if not part.is_multipart():
            text = part.get_payload()
            assert isinstance(text, str)
            found.append((part.get_content_type(), text))
    return found


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1, 0, 2048), (2049, 5, 70_000), (1, 2, 3, 4, 5, 6, 7, 1 << 20)]
)
def test_images(sizes: Sequence[int], tmp_path: Path) -> None:
    """Xorriso reads the same names and contents, and no block is over."""
    files = {f"{number}-long.name-of-a-file": os.urandom(size) for number, size in enumerate(sizes)}
    image = tmp_path / "image"
    image.write_bytes(iso_image("cidata", files))
    assert unpacked(image, tmp_path) == files
    assert image.stat().st_size == SECTOR * (21 + sum(-(-size // SECTOR) for size in sizes))
    blkid = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin")
    if blkid:
        words: list[str | Path] = [blkid, "-p", "-o", "value", "-s", "LABEL", "-s", "TYPE", image]
        found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert found.split() == ["cidata", "iso9660"]


def test_nothing_is_asked_for_is_no_user_data(key: Path, tmp_path: Path) -> None:
    """A key alone: cloud-init gets empty user-data, the VM's name, and the key."""
    files = unpacked(seed(Options(ssh_keys=(str(key),))), tmp_path)
    assert sorted(files) == ["meta-data", "user-data", "vendor-data"]
    assert files["user-data"] == b"#cloud-config\n{}\n"
    meta = json.loads(files["meta-data"])
    assert meta["local-hostname"] == "web"
    assert meta["public-keys"] == [KEY]
    assert parts(files["vendor-data"]) == [
        ("text/cloud-config", "#cloud-config\ndisable_root: false\n")
    ]


def test_user_data(tmp_path: Path) -> None:
    """A file is the user-data as it is."""
    data = b"#cloud-config\nusers: [{name: me}]\n# \xff\n"
    (tmp_path / "data").write_bytes(data)
    files = unpacked(seed(Options(cloud_init=(str(tmp_path / "data"),))), tmp_path)
    assert files.keys() == {"meta-data", "user-data"}
    assert files["user-data"] == data


def test_a_directory(tmp_path: Path) -> None:
    """Its files are taken as they are, and no others."""
    given = {
        "user-data": b"#!/bin/sh\n",
        "meta-data": b"instance-id: one\n",
        "network-config": b"version: 2\n",
        "vendor-data": b"",
    }
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in {**given, "other": b"no"}.items():
        (folder / name).write_bytes(data)
    assert unpacked(seed(Options(cloud_init=(str(folder),))), tmp_path) == given


def test_the_agent(tmp_path: Path) -> None:
    """A script of vendor-data installs the agent as it is here, and its unit."""
    files = unpacked(seed(Options(agent=True)), tmp_path)
    ((kind, script),) = parts(files["vendor-data"])
    assert kind == "text/x-shellscript"
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=True).returncode == 0
    encoded = [block.partition("\nEND\n")[0] for block in script.split("<<'END'\n")[1:]]
    assert b64decode(encoded[0]) == AGENT.read_bytes()
    assert b64decode(encoded[1]) == AGENT.with_name("vmm-agent.service").read_bytes()


def test_the_machine_is_new_when_something_changed(key: Path, tmp_path: Path) -> None:
    """The instance-id follows from the name and the contents, and the file from its content."""
    (tmp_path / "data").write_bytes(b"#cloud-config\n")
    options = Options(cloud_init=(str(tmp_path / "data"),))
    first = seed(options)
    assert seed(options) == first
    assert first.stat().st_mode & 0o777 == 0o600
    assert first.parent.stat().st_mode & 0o777 == 0o700
    others = [
        seed(options, "db"),
        seed(options._replace(ssh_keys=(str(key),))),
        seed(options._replace(agent=True)),
    ]
    ids = {
        json.loads(unpacked(one, tmp_path)["meta-data"])["instance-id"] for one in (first, *others)
    }
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("name", "host"),
    [("web.example", "web-example"), ("-_-", "vm"), ("x" * 70, "x" * 63), ("über 1", "ber-1")],
)
def test_host_names(name: str, host: str, tmp_path: Path) -> None:
    """The name of a VM becomes one of a host."""
    files = unpacked(seed(Options(agent=True), name), tmp_path)
    assert json.loads(files["meta-data"])["local-hostname"] == host


WRONG: dict[str, tuple[Options, str]] = {
    "no file": (Options(cloud_init=("none",)), "none: No such file or directory"),
    "no data": (Options(cloud_init=("text",)), "text: no user-data: the first line is"),
    "two": (Options(cloud_init=("a", "b")), "cloud-init specified multiple times"),
    "empty directory": (Options(cloud_init=("empty",)), "empty: neither user-data nor meta-data"),
    "pipe": (Options(cloud_init=("pipe",)), "pipe: not a regular file"),
    "large": (Options(cloud_init=("large",)), "large: more than 16777216 bytes"),
    "private key": (Options(ssh_keys=("private",)), "private: a private key: use private.pub"),
    "no key": (Options(ssh_keys=("text",)), "text: no public key"),
    "control letters": (Options(ssh_keys=("controls",)), "controls: no public key"),
    "keys twice": (
        Options(cloud_init=("full",), ssh_keys=("key.pub",)),
        "full: its meta-data has the keys",
    ),
    "vendor twice": (
        Options(cloud_init=("vendor",), agent=True),
        "vendor: vendor-data, ssh keys and an agent: use one",
    ),
    "no vsock": (Options(agent=True, vsock=()), "--agent is reached by a vsock device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense(
    case: str, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    """It is one line, and nothing is made."""
    del key
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("hello\n")
    Path("private").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    Path("controls").write_text(f"{KEY}\x1b[2J\n")
    os.mkfifo("pipe")
    with Path("large").open("wb") as file:
        file.write(b"#")
        file.truncate((16 << 20) + 1)
    for name, files in (
        ("empty", ()),
        ("full", ("user-data", "meta-data")),
        ("vendor", ("user-data", "vendor-data")),
    ):
        Path(name).mkdir()
        for one in files:
            (Path(name) / one).write_text("#cloud-config\n")
    given, told = WRONG[case]
    with pytest.raises(SpecError) as caught:
        seed(given)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert not state.exists()


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(SpecError, match="Not a directory"):
        seed(Options(agent=True))


def test_start(serve: Serve, key: Path, tmp_path: Path, state: Path) -> None:
    """`start` sends the seed as the last disk, read-only, and a VM with an agent has vsock."""

    def answer(request: AnyRequest) -> list[Started]:
        assert isinstance(request, Start)
        return [Started(id=7, pid=700, tty="/dev/pts/7")]

    daemon = serve(answer)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    subprocess.run([VMCTL, "start", "-d", disk, "--ssh-key", key, "--agent", "web"], check=True)
    (request,) = daemon.requests
    assert isinstance(request, Start)
    assert request.has_vsock
    assert [(one.path, one.is_read_only) for one in request.disks] == [
        (str(disk), False),
        (str(next(state.iterdir())), True),
    ]


def test_no_seed_for_a_snapshot(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A VM that continues from a snapshot refuses a seed: it is set up already."""
    assert start(["web"], origin=("snap",), ssh_keys=(str(key),)) == 1
    assert capsys.readouterr().err == (
        "vmctl: --from says all of the VM: use no options that say what it is\n"
    )
