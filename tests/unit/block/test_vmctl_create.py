"""`vmctl create` and `vmctl image`: files, messages, exit statuses."""

from __future__ import annotations

import io
import json
import lzma
import os
import signal
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.vmctl_driver import VMCTL
from vmctl.images.disk_files import DiskFile, parse_disk
from vmctl.line.cli import main
from vmm_kvm.block.device import is_read_only_device
from vmm_kvm.block.image import Format
from vmm_kvm.errors import ImageError
from vmm_kvm.images.create import copy, create_image, create_qcow2, open_snapshot
from vmm_kvm.images.opening import open_image

USAGE = "usage:\tvmctl [-v] create [-b base | -i disk] [-s size] disk\n"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, disk_format: Format, offset: int, data: bytes) -> None:
    """Write to an image."""
    image = open_image(path, disk_format, False)
    image.writev(offset, [memoryview(data)])
    image.close()


def read(path: str, disk_format: Format, offset: int, size: int) -> bytes:
    """Read from an image."""
    image = open_image(path, disk_format, True)
    data = bytearray(size)
    image.readv(offset, [memoryview(data)])
    image.close()
    return bytes(data)


@pytest.mark.parametrize(
    ("argument", "contents", "found"),
    [
        ("qcow2:a.raw", b"", DiskFile("a.raw", Format.QCOW2)),
        ("raw:a.qcow2", b"QFI\xfb", DiskFile("a.qcow2", Format.RAW)),
        ("a.raw", b"QFI\xfb", DiskFile("a.raw", Format.QCOW2)),
        ("a.QCOW2", None, DiskFile("a.QCOW2", Format.QCOW2)),
        ("a.qcow2", b"text", DiskFile("a.qcow2", Format.QCOW2)),
        ("a.Raw", None, DiskFile("a.Raw", Format.RAW)),
        ("a.img", None, DiskFile("a.img", Format.RAW)),
        ("QCOW2:a", None, DiskFile("QCOW2:a", Format.RAW)),
        ("qcow2", None, DiskFile("qcow2", Format.QCOW2)),
        (".", None, DiskFile(".", Format.RAW)),
    ],
)
def test_format(argument: str, contents: bytes | None, found: DiskFile) -> None:
    """The format is that of the prefix, of the first bytes, of the extension, or raw."""
    if contents is not None:
        Path(found.path).write_bytes(contents)
    assert parse_disk(argument) == found


@pytest.mark.parametrize(
    ("arguments", "status", "errors"),
    [
        (["-s", "10M", "a.raw"], 0, "vmctl: raw imagefile created\n"),
        (["-s", "10M", "a.qcow2"], 0, "vmctl: qcow2 imagefile created\n"),
        (["-s", "10M", "qcow2:a"], 0, "vmctl: qcow2 imagefile created\n"),
        ([], 1, USAGE),
        (["-s", "10M"], 1, USAGE),
        (["-s", "10M", "a", "b"], 1, USAGE),
        (["a"], 1, "could not create a: missing size argument\n" + USAGE),
        (["-s", "1B", "a"], 1, "vmctl: disk size must be at least 1MB\n"),
        (
            ["-s", "10", "a"],
            1,
            (
                "vmctl: disk size must be at least 1MB\n"
                "vmctl: 10 is a number of bytes: did you mean 10G?\n"
            ),
        ),
        (["-s", "-5G", "a"], 1, "vmctl: disk size must be at least 1MB\n"),
        (["-s", "x", "a"], 1, "vmctl: invalid disk size: x: Invalid argument\n"),
        (["-s", "9E", "a"], 1, "vmctl: invalid disk size: 9E: Result too large\n"),
        (
            ["-s", "2.3M", "a"],
            0,
            "vmctl: disk size rounded to 2.0M\nvmctl: raw imagefile created\n",
        ),
        (["-b", "x", "-i", "y", "a.qcow2"], 1, "vmctl: conflicting -b and -i arguments\n"),
        (["-b", "x", "a.raw"], 1, "vmctl: base images require qcow2 disk format\n"),
        (
            ["-s", "1M", "old"],
            1,
            "vmctl: create imagefile operation failed: File exists\n",
        ),
        (
            ["-s", "1M", "no/where"],
            1,
            "vmctl: create imagefile operation failed: No such file or directory\n",
        ),
        (
            ["-s", "7E", "a.qcow2"],
            1,
            "vmctl: create imagefile operation failed: Numerical result out of range\n",
        ),
        (
            ["-b", "missing", "a.qcow2"],
            1,
            "vmctl: failure to read base image header: missing: No such file or directory\n",
        ),
        (["-b", "empty", "a.qcow2"], 1, "vmctl: missing disk size\n"),
        (["-b", "old", "a.qcow2"], 0, "vmctl: qcow2 imagefile created\n"),
        (["-b", "raw:old", "-s", "1M", "a.qcow2"], 0, "vmctl: qcow2 imagefile created\n"),
        (
            ["-b", "qcow2:old", "a.qcow2"],
            1,
            "vmctl: failure to read base image header: old: short read on header\n",
        ),
        (
            ["-b", "base.qcow2", "-s", "3M", "a.qcow2"],
            1,
            "vmctl: size cannot be smaller than base disk size\n",
        ),
        (["-b", "zero.qcow2", "a.qcow2"], 1, "vmctl: missing disk size\n"),
        (["-b", "base.qcow2", "a.qcow2"], 0, "vmctl: qcow2 imagefile created\n"),
        (["-b", "base.qcow2", "-s", "4M", "a.qcow2"], 0, "vmctl: qcow2 imagefile created\n"),
        (
            ["-i", "missing", "a.raw"],
            1,
            "vmctl: missing: No such file or directory\nvmctl: failed to open source image file\n",
        ),
        (
            ["-i", "qcow2:old", "a.raw"],
            1,
            "vmctl: old: short read on header\nvmctl: failed to open source image file\n",
        ),
        (
            ["-i", "base.qcow2", "-s", "3M", "a.raw"],
            1,
            "vmctl: size cannot be smaller than input disk size\n",
        ),
        (
            ["-i", "base.qcow2", "old"],
            1,
            "vmctl: old: File exists\nvmctl: failed to create destination image file\n",
        ),
        (["-i", "base.qcow2", "a.raw"], 0, "vmctl: raw imagefile created\n"),
        (["-i", "base.qcow2", "-s", "8M", "a.raw"], 0, "vmctl: raw imagefile created\n"),
        (
            ["-i", "old", "a.qcow2"],
            0,
            "vmctl: destination size rounded to 1 megabytes\nvmctl: qcow2 imagefile created\n",
        ),
    ],
)
def test_create(
    arguments: list[str], status: int, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Successes and refusals have OpenBSD's words; a refusal leaves nothing behind."""
    Path("old").write_bytes(b"text")
    Path("empty").write_bytes(b"")
    create_qcow2("base.qcow2", 4 * MIB)
    create_qcow2("zero.qcow2", 0)
    before = set(Path().iterdir())
    assert main(["create", *arguments]) == status
    assert tuple(capsys.readouterr()) == ("", errors)
    assert len(set(Path().iterdir()) - before) == (1 if status == 0 else 0)


def test_a_raw_image_is_sparse_and_private() -> None:
    """A raw image is a hole of the requested length, for its owner alone."""
    main(["create", "-s", "1G", "a.raw"])
    status = Path("a.raw").stat()
    assert (status.st_size, status.st_blocks) == (1 << 30, 0)
    assert stat.S_IMODE(status.st_mode) == 0o600


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize(
    "size", [0, 1, 512 * MIB, 512 * MIB + 1, 1 << 44, (1 << 44) + MIB, 1 << 50]
)
def test_qemu_takes_what_is_created(size: int) -> None:
    """QEMU finds a new image clean, of the right size."""
    create_qcow2("a.qcow2", size)
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", "a.qcow2"], check=True, capture_output=True
    )
    assert json.loads(told.stdout)["virtual-size"] == size - size % 512
    subprocess.run(["qemu-img", "check", "-q", "a.qcow2"], check=True)
    assert main(["image", "check", "a.qcow2"]) == 0


def test_an_overlay_reads_its_base(directory: Path) -> None:
    """A relative base starts at the new image's directory; writes stay in the overlay."""
    (directory / "sub").mkdir()
    create_qcow2("sub/base.qcow2", 4 * MIB)
    write("sub/base.qcow2", Format.QCOW2, MIB, b"base")
    assert main(["create", "-b", "base.qcow2", "sub/top.qcow2"]) == 0
    write("sub/top.qcow2", Format.QCOW2, MIB + 1, b"A")
    assert read("sub/top.qcow2", Format.QCOW2, MIB, 5) == b"bAse\0"
    assert read("sub/base.qcow2", Format.QCOW2, MIB, 5) == b"base\0"


def test_a_copy_is_whole_and_sparse() -> None:
    """A copy holds the contents of the chain; zeros use no space in it."""
    create_qcow2("base.qcow2", 64 * MIB)
    write("base.qcow2", Format.QCOW2, 5 * MIB + 7, b"hello")
    write("base.qcow2", Format.QCOW2, 9 * MIB, bytes(MIB))
    create_qcow2("top.qcow2", 64 * MIB, "base.qcow2")
    write("top.qcow2", Format.QCOW2, 64 * MIB - 3, b"end")
    assert main(["create", "-i", "top.qcow2", "copy.raw"]) == 0
    assert main(["create", "-i", "copy.raw", "back.qcow2"]) == 0
    for path, disk_format in (("copy.raw", Format.RAW), ("back.qcow2", Format.QCOW2)):
        assert read(path, disk_format, 5 * MIB, 16) == bytes(7) + b"hello" + bytes(4)
        assert read(path, disk_format, 64 * MIB - 3, 4) == b"end\0"
        assert Path(path).stat().st_blocks * 512 <= MIB


def test_a_copy_that_fails_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    """A source that cannot be read leaves no half copy."""
    create_qcow2("a.qcow2", 4 * MIB)
    write("a.qcow2", Format.QCOW2, 0, b"x")
    with Path("a.qcow2").open("r+b") as file:  # damage the L1 entry of its only table
        file.seek(65536)
        file.write((0x8000000000040200).to_bytes(8, "big"))
    assert main(["create", "-i", "a.qcow2", "copy.raw"]) == 1
    assert capsys.readouterr().err.endswith("vmctl: failed to read from source\n")
    assert not Path("copy.raw").exists()


def under_way(source: str, target: str, *command: str) -> subprocess.Popen[bytes]:
    """Return the process of a copy that is stopped halfway."""
    while True:
        process = subprocess.Popen(
            [*command, VMCTL, "create", "-i", source, target], stderr=subprocess.PIPE
        )
        while not has_begun(process, target) and process.poll() is None:
            pass
        if process.returncode is None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if not Path(target).exists():
                return process
            process.send_signal(signal.SIGCONT)
        # It was done before it was stopped.
        process.communicate()
        Path(target).unlink()


def has_begun(process: subprocess.Popen[bytes], target: str) -> bool:
    """Tell whether a copy has written to its file, which has no name, or a temporary one."""
    directory = Path(f"/proc/{process.pid}/fd")
    for entry in directory.iterdir():
        try:
            named, size = str(entry.readlink()), entry.stat().st_size
        except OSError:  # closed meanwhile
            continue
        if size >= MIB and named.endswith((" (deleted)", ".part")):
            return True
    return Path(target).exists()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]
)
@pytest.mark.parametrize("target", ["copy.img", "copy.qcow2"])
def test_a_copy_that_is_ended_leaves_nothing(number: signal.Signals, target: str) -> None:
    """If a signal ends a copy, no image or part of one is left."""
    Path("source.img").write_bytes(b"x" * (64 * MIB))
    with under_way("source.img", target) as process:
        assert not Path(target).exists()
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (-number, b"")
    assert [path.name for path in Path().iterdir()] == ["source.img"]


def test_a_signal_that_is_ignored_ends_no_copy() -> None:
    """A signal that is ignored, as under nohup, does not end a copy."""
    Path("source.img").write_bytes(b"x" * (16 * MIB))
    shell = ("/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    with under_way("source.img", "x", *shell) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"vmctl: raw imagefile created\n")
    assert Path("x").read_bytes() == Path("source.img").read_bytes()


def test_a_copy_takes_no_place_that_was_taken_meanwhile() -> None:
    """A file that is made meanwhile under the copy's name stays unchanged."""
    Path("source.img").write_bytes(b"x" * (64 * MIB))
    with under_way("source.img", "copy.img") as process:
        Path("copy.img").write_bytes(b"another")
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (
        1,
        b"vmctl: copy.img: File exists\nvmctl: failed to create destination image file\n",
    )
    assert Path("copy.img").read_bytes() == b"another"
    assert {path.name for path in Path().iterdir()} == {"source.img", "copy.img"}


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    """`image info` prints the facts about an image, also as JSON, and while it is in use."""
    create_qcow2("base.qcow2", 4 * MIB)
    create_qcow2("top.qcow2", 4 * MIB, "base.qcow2")
    image = open_image("top.qcow2", Format.QCOW2, False)
    assert main(["image", "info", "--json", "top.qcow2"]) == 0
    image.close()
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["virtual_size"], facts["cluster_size"]) == (
        *("qcow2", 4 * MIB, 65536),
    )
    assert (facts["base"], facts["base_format"]) == ("base.qcow2", "qcow2")
    assert facts["bases"] == ["qcow2:base.qcow2"]
    assert main(["im", "inf", "top.qcow2"]) == 0
    assert "virtual size:        4.0M (4194304 bytes)\n" in capsys.readouterr().out
    Path("base.qcow2").unlink()
    assert main(["image", "info", "top.qcow2"]) == 0
    told = capsys.readouterr().out
    assert "base error:          base.qcow2: No such file or directory\n" in told


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    """A count that is too low is an error, one that is too high a leak."""
    create_qcow2("a.qcow2", 4 * MIB)
    with Path("a.qcow2").open("r+b") as file:
        file.truncate(6 * 65536)
        file.seek(3 * 65536)
        file.write(bytes([0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 2]))
    assert main(["image", "check", "--json", "a.qcow2"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["errors"], report["leaked_clusters"]) == (1, 2)
    assert report["findings"] == ["cluster 1: 1 references, counted as 0"]
    assert main(["image", "check", "a.qcow2"]) == 1
    assert "error: cluster 1: 1 references, counted as 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["info", "check"])
def test_no_image(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is no image is one line of error."""
    assert main(["image", verb, "missing.qcow2"]) == 1
    Path("text.qcow2").write_bytes(b"text" * 200)
    assert main(["image", verb, "text.qcow2"]) == 1
    assert tuple(capsys.readouterr()) == (
        "",
        (
            "vmctl: missing.qcow2: No such file or directory\n"
            "vmctl: text.qcow2: invalid magic numbers\n"
        ),
    )


def test_check_wants_the_image_unused(capsys: pytest.CaptureFixture[str]) -> None:
    """An image that another program writes cannot be checked."""
    create_qcow2("a.qcow2", 4 * MIB)
    image = open_image("a.qcow2", Format.QCOW2, False)
    assert main(["image", "check", "a.qcow2"]) == 1
    image.close()
    told = capsys.readouterr().err
    assert told.startswith("vmctl: a.qcow2: another process writes to it")
    assert told.count("\n") == 1


QEMU_FORMATS = (
    *(("vmdk", "VMDK", ()), ("vdi", "VDI", ()), ("vhdx", "VHDX", ()), ("qed", "QED", ())),
    *(
        ("vpc", "VHD", ()),
        ("vpc", "VHD", ("-o", "subformat=fixed")),
        ("parallels", "Parallels", ()),
    ),
)


@pytest.mark.parametrize(("name", "called", "options"), QEMU_FORMATS)
def test_foreign_formats_are_refused(
    name: str, called: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of a foreign format is not copied as raw, unless raw is named."""
    subprocess.run(["qemu-img", "create", "-q", "-f", name, *options, "disk.img", "4M"], check=True)
    problem = (
        f"vmctl: disk.img: {called} images are not supported: "
        "use qemu-img convert -O qcow2, or say raw:disk.img"
    )
    for words in (["create", "-i", "disk.img", "x.raw"], ["image", "info", "disk.img"]):
        assert main(words) == 1
        assert capsys.readouterr().err.splitlines()[0] == problem
    assert not Path("x.raw").exists()
    with pytest.raises(ImageError, match=f"{called} images are not supported"):
        open_image("disk.img", None, True)
    assert main(["create", "-i", "raw:disk.img", "x.raw"]) == 0


@pytest.mark.parametrize(
    ("command", "method"), [("gzip", "gzip"), ("xz", "xz"), ("zstd", "zstd"), ("bzip2", "bzip2")]
)
def test_compressed_images_are_refused(
    command: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compressed image is refused; the line says what to do."""
    data = subprocess.run([command, "-c"], input=bytes(MIB), capture_output=True, check=True)
    Path("disk.img").write_bytes(data.stdout)
    assert main(["create", "-i", "disk.img", "x.raw"]) == 1
    error = f"vmctl: disk.img: compressed by {method}: unpack it first, or say raw:disk.img\n"
    assert capsys.readouterr().err == error


def _ova() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("machine.ovf"))
    return made.getvalue()


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("disk.img", bytes(MIB))
    return made.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (_zip(), "a zip archive: unpack it first"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(1000), "a 7z archive: unpack it first"),
        (b"Rar!\x1a\x07\x01\0" + bytes(1000), "a RAR archive: unpack it first"),
        (b"MSWIM\0\0\0" + bytes(1000), "a WIM archive: unpack it first"),
        (_ova(), "an OVA archive: unpack it by tar first"),
        (b"LZIP\1" + bytes(1000), "compressed by lzip: unpack it first"),
        (b"\x89LZO\0\r\n\x1a\n" + bytes(1000), "compressed by lzop: unpack it first"),
        (b"\x1f\x9d\x90" + bytes(1000), "compressed by compress: unpack it first"),
        (lzma.compress(bytes(1000), lzma.FORMAT_ALONE), "compressed by lzma: unpack it first"),
        (b"MSCF\0\0\0\0" + bytes(1000), "a cabinet archive: unpack it first"),
        (b"VMA\0\0\0\0\1" + bytes(1000), "a Proxmox backup archive: unpack it first"),
        (b"\n <!DOCTYPE html>\n<html>404", "a web page, not a disk: download it again"),
        (b'<?xml version="1.0"?>\n<Error/>', "an XML document, not a disk: download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS, not a disk: download it again",
        ),
        (
            b"\x3a\xff\x26\xed\1\0\0\0" + bytes(1000),
            "Android sparse images are not supported: use qemu-img convert -O qcow2",
        ),
        (
            b"EVF\t\r\n\xff\0" + bytes(1000),
            "EWF images are not supported: use qemu-img convert -O qcow2",
        ),
        (
            bytes(8192) + b"koly".ljust(512, b"\0"),
            "DMG images are not supported: use qemu-img convert -O qcow2",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_archives_are_refused(data: bytes, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive that holds an image is refused as a disk, unless raw is named."""
    Path("disk.img").write_bytes(data)
    assert main(["create", "-i", "disk.img", "x.raw"]) == 1
    assert capsys.readouterr().err == f"vmctl: disk.img: {what}, or say raw:disk.img\n"
    assert main(["create", "-i", "raw:disk.img", "x.raw"]) == 0


def test_a_tar_archive_is_a_disk() -> None:
    """A tar archive is accepted: guests use one without a file system."""
    with tarfile.open("disk.img", "w") as archive:
        archive.addfile(tarfile.TarInfo("disk.raw"))
    assert main(["create", "-i", "disk.img", "x.raw"]) == 0


@pytest.mark.parametrize(
    "name", ["foo.vmdk", "a.dmg", "b.qcow", "FOO.VDI", "a.b.vhd", "x.vhdx", "y.qed", "z.hdd"]
)
def test_a_new_image_is_not_named_like_another_format(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`create -s 1M foo.vmdk` makes no raw file of that name, unless raw is named."""
    assert main(["create", "-s", "1M", name]) == 1
    assert "images are not supported" in capsys.readouterr().err
    assert not Path(name).exists()
    assert main(["create", "-s", "1M", f"raw:{name}"]) == 0
    assert main(["create", "-s", "1M", f"qcow2:{name}.2"]) == 0


@pytest.mark.parametrize("name", ["a.img.gz", "b.raw.XZ", "c.zip", "d.qcow2.zst", "e.ova", "f.7z"])
def test_a_new_image_is_not_named_like_a_packed_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new raw image with the name of a packed file is refused, unless raw is named."""
    error = f"vmctl: {name}: named like a packed file: choose another name, or say raw:{name}\n"
    assert main(["create", "-s", "1M", name]) == 1
    assert capsys.readouterr().err == error
    assert not Path(name).exists()
    assert main(["create", "-s", "1M", f"raw:{name}"]) == 0


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("fifo", "neither a regular file nor a block device"),
        ("/dev/null", "neither a regular file nor a block device"),
        ("/dev/zero", "neither a regular file nor a block device"),
        ("/proc/self/mem", "Invalid argument"),
        (".", "neither a regular file nor a block device"),
    ],
)
def test_what_no_disk_can_be_in(path: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb says so in one line, about the file."""
    os.mkfifo("fifo")
    for words in (["image", "info", path], ["image", "check", path], ["create", "-i", path, "x"]):
        assert main(words) == 1
        told = capsys.readouterr().err.splitlines()[0]
        assert told in {f"vmctl: {path}: {why}", f"vmctl: {path}: Is a directory"}
    assert not Path("x").exists()


def test_raw_images_of_all_kinds_are_taken() -> None:
    """Empty files, file systems, partition tables and text are raw disks of any size."""
    for index, data in enumerate((b"", b"x", bytes(510) + b"\x55\xaa", b"\x1f" * 600)):
        path = f"{index}.img"
        Path(path).write_bytes(data)
        image = open_image(path, None, True)
        image.close()


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("base_format", list(Format))
@pytest.mark.parametrize("size", [4 * MIB, 20 * 1024 * MIB])
def test_an_overlay_may_be_larger_than_its_base(base_format: Format, size: int) -> None:
    """An overlay may be larger than a base of either format; QEMU reads the same, then zeros."""
    base = f"base.{base_format}"
    create_image(base, base_format, 4 * MIB)
    write(base, base_format, 4 * MIB - 4, b"last")
    assert main(["create", "-b", base, "-s", f"{size}B", "top.qcow2"]) == 0
    assert read("top.qcow2", Format.QCOW2, 4 * MIB - 4, 4) == b"last"
    if size > 4 * MIB:
        assert read("top.qcow2", Format.QCOW2, 4 * MIB - 4, 8) == b"last" + bytes(4)
        write("top.qcow2", Format.QCOW2, 4 * MIB - 2, b"over")
        assert read("top.qcow2", Format.QCOW2, 4 * MIB - 4, 8) == b"laover" + bytes(2)
        write("top.qcow2", Format.QCOW2, size - 3, b"end")
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", "top.qcow2"], check=True, capture_output=True
    )
    facts = json.loads(told.stdout)
    assert (facts["virtual-size"], facts["backing-filename-format"]) == (size, base_format)
    subprocess.run(["qemu-img", "check", "-q", "top.qcow2"], check=True)
    assert main(["create", "-i", "top.qcow2", "copy.qcow2"]) == 0
    subprocess.run(["qemu-img", "compare", "-q", "top.qcow2", "copy.qcow2"], check=True)


def test_a_base_that_is_no_image_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal names the base's format, unless raw is named."""
    Path("disk.vmdk").write_bytes(b"KDMV" + bytes(MIB))
    assert main(["create", "-b", "disk.vmdk", "x.qcow2"]) == 1
    assert "VMDK images are not supported" in capsys.readouterr().err
    assert not Path("x.qcow2").exists()
    assert main(["create", "-b", "raw:disk.vmdk", "x.qcow2"]) == 0


def test_no_overlay_on_an_image_that_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """A base that a VM writes would change under its overlay: the overlay is refused."""
    create_qcow2("web.qcow2", 4 * MIB)
    writer = open_image("web.qcow2", Format.QCOW2, False)
    try:
        assert main(["create", "-b", "web.qcow2", "x.qcow2"]) == 1
    finally:
        writer.close()
    assert "web.qcow2: another process writes to it" in capsys.readouterr().err
    assert not Path("x.qcow2").exists()
    reader = open_image("web.qcow2", Format.QCOW2, True)
    try:
        assert main(["create", "-b", "web.qcow2", "x.qcow2"]) == 0
    finally:
        reader.close()


def test_no_overlay_that_nobody_can_open(capsys: pytest.CaptureFixture[str]) -> None:
    """An overlay is refused if opening it would fail: on an image with three bases."""
    create_qcow2("0.qcow2", 4 * MIB)
    for index in range(3):
        assert main(["create", "-b", f"{index}.qcow2", f"{index + 1}.qcow2"]) == 0
    open_image("3.qcow2", Format.QCOW2, True).close()
    capsys.readouterr()
    assert main(["create", "-b", "3.qcow2", "4.qcow2"]) == 1
    assert capsys.readouterr().err == "vmctl: 3.qcow2: it has 3 base images already, the most\n"
    assert not Path("4.qcow2").exists()


@pytest.mark.parametrize("disk_format", list(Format))
@pytest.mark.parametrize("place", [0, 3 << 40, (8 << 40) - MIB])
def test_a_huge_disk_with_little_in_it(disk_format: Format, place: int) -> None:
    """A copy skips holes: 8 TiB with one block are a few parts, and are equal."""
    create_image("a.img", disk_format, 8 << 40)
    write("a.img", disk_format, place, b"data")
    image = open_image("a.img", disk_format, True)
    assert len(list(image.parts(0, image.size))) <= 4
    create_qcow2("b.qcow2", 8 << 40)
    target = open_image("b.qcow2", Format.QCOW2, False)
    done: list[int] = []
    copy(image, target, done.append)
    target.close()
    image.close()
    assert sum(done) == 8 << 40
    assert read("b.qcow2", Format.QCOW2, place, 8) == b"data" + bytes(4)


def test_a_read_only_device_is_not_written(tmp_path: Path) -> None:
    """A read-only block device is refused for writing, and can be read."""
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    made = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(disk)],
        check=True,
        capture_output=True,
        text=True,
    )
    device = made.stdout.strip()
    try:
        open_image(device, Format.RAW, True).close()
        with pytest.raises(ImageError, match=r"read-only|Read-only|Permission denied"):
            open_image(device, Format.RAW, False)
        fd = os.open(device, os.O_RDONLY)
        try:
            assert is_read_only_device(fd)
        finally:
            os.close(fd)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("disk_format", list(Format))
@pytest.mark.parametrize("said", [True, False])
def test_a_snapshot_of_an_image(disk_format: Format, said: bool) -> None:
    """A snapshot's writes go to a file of its own, are read back, and last as long as it."""
    create_image("disk", disk_format, 4 * MIB)
    write("disk", disk_format, MIB, b"base")
    before = Path("disk").read_bytes()
    scratch = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600)
    try:
        for expected in (b"base", b"bOse"):
            image = open_snapshot("disk", disk_format if said else None, scratch)
            assert image.size == 4 * MIB
            data = bytearray(4)
            image.readv(MIB, [memoryview(data)])
            assert bytes(data) == expected
            image.writev(MIB + 1, [memoryview(b"O")])
            with pytest.raises(ImageError, match="another process"):
                open_image("disk", disk_format, False)
            open_image("disk", disk_format, True).close()
            image.close()
    finally:
        os.close(scratch)
    assert Path("disk").read_bytes() == before


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("disk_format", list(Format))
@pytest.mark.parametrize("size", [8 * MIB, 40 * 1024 * MIB])
def test_resize(disk_format: Format, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """An image grows by zeros; it shrinks only if that is requested, and QEMU agrees."""
    create_image("disk", disk_format, 4 * MIB)
    write("disk", disk_format, 4 * MIB - 8, b"the end.")
    named = f"{disk_format}:disk"
    assert main(["image", "resize", named, f"{size}B"]) == 0
    assert read("disk", disk_format, 4 * MIB - 8, 16) == b"the end." + bytes(8)
    write("disk", disk_format, size - 4, b"last")
    assert main(["image", "resize", named, "2M"]) == 1
    told = f"vmctl: disk: {size} bytes: to cut some off, say --shrink\n"
    assert capsys.readouterr().err.endswith(told)
    assert main(["image", "resize", "--shrink", named, "+2M"]) == 1
    told = "vmctl: +2M: a size is the whole disk's, not what is added to it\n"
    assert capsys.readouterr().err.endswith(told)
    assert main(["image", "resize", "--shrink", named, "2M"]) == 0
    assert main(["image", "resize", named, f"{size}B"]) == 0
    create_image("empty", disk_format, size)
    formats = ["-f", disk_format, "-F", disk_format]
    subprocess.run(["qemu-img", "compare", "-q", *formats, "disk", "empty"], check=True)
    if disk_format is Format.QCOW2:
        subprocess.run(["qemu-img", "check", "-q", "disk"], check=True)
        assert main(["image", "check", "disk"]) == 0


@pytest.mark.usefixtures("qemu_img")
def test_resize_of_an_overlay() -> None:
    """Contents of a longer base that an overlay did not show stay hidden when it grows."""
    create_image("base", Format.RAW, 8 * MIB)
    write("base", Format.RAW, 0, b"b" * (8 * MIB))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "3M"]
    subprocess.run(command, check=True)
    assert main(["image", "resize", "qcow2:top", "6M"]) == 0
    assert read("top", Format.QCOW2, 3 * MIB - 2, 4) == b"bb\0\0"
    assert read("top", Format.QCOW2, 6 * MIB - 2, 2) == bytes(2)
    subprocess.run(["qemu-img", "check", "-q", "top"], check=True)


def test_resize_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use, a directory, and a size too large for its table are refused, unchanged."""
    create_qcow2("a.qcow2", 4 * MIB)
    before = Path("a.qcow2").read_bytes()
    image = open_image("a.qcow2", Format.QCOW2, True)
    assert main(["image", "resize", "a.qcow2", "8M"]) == 1
    image.close()
    assert "another process" in capsys.readouterr().err
    assert main(["image", "resize", "a.qcow2", "5T"]) == 1
    assert "no room for that" in capsys.readouterr().err
    assert main(["image", "resize", ".", "5M"]) == 1
    assert capsys.readouterr().err == "vmctl: .: Is a directory\n"
    assert Path("a.qcow2").read_bytes() == before
