"""`vmctl create`, `vmctl image info` and `vmctl image check`: disk images, without a daemon.

Exit status: 0 on success, 1 on any failure, and from `check` 1 if the image is not sound.

Source: sections 2.5 and 3.5 of OpenBSD's behaviour.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vmd.config.sizes import SizeError, fmt_scaled, scan_scaled
from vmm_kvm.block.create import SourceError, copy, create_image, create_qcow2, rounded_up
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format, image_chain, open_image, probe
from vmm_kvm.block.locks import lock
from vmm_kvm.block.qcow2.check import check
from vmm_kvm.block.qcow2.header import Compatible, Header, Incompatible, parse_header, read_header
from vmm_kvm.block.qcow2.snapshots import read_snapshots
from vmm_kvm.errors import ImageError, VmmError

_CREATE_USAGE = "usage:\tvmctl [-v] create [-b base | -i disk] [-s size] disk"
_MIB = 1 << 20
_LONG_COPY = 256 << 20  # bytes from which on a person may wonder whether it is still at work

Facts = dict[str, str | int | bool | list[str] | None]


class DiskFile(NamedTuple):
    """What an argument that names a disk stands for."""

    path: str
    disk_format: Format


class _RefusedError(Exception):
    """What is asked cannot be done; `str()` has the lines for the user."""


def parse_disk(argument: str) -> DiskFile:
    """Tell path and format: by prefix, by the file's first bytes, by extension; else it is raw.

    Source: section 2.5 of OpenBSD's behaviour.
    """
    for disk_format in Format:
        if argument.startswith(f"{disk_format}:"):
            return DiskFile(argument[len(disk_format) + 1 :], disk_format)
    try:
        descriptor = os.open(argument, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        pass  # it is to be created, or opening it will tell why not
    else:
        try:
            if probe(os.read(descriptor, 4)) is Format.QCOW2:
                return DiskFile(argument, Format.QCOW2)
        except OSError:
            pass  # a directory; see above
        finally:
            os.close(descriptor)
    extension = argument.rpartition(".")[2].lower()
    return DiskFile(argument, Format.QCOW2 if extension == Format.QCOW2 else Format.RAW)


def set_up_logging(*, verbose: bool) -> None:
    """Say on standard error what the image code logs, or only what the command itself says."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.CRITICAL, format="vmctl: %(message)s"
    )


# vmctl create


def create_usage() -> int:
    """Tell how `vmctl create` is used; return the exit status."""
    print(_CREATE_USAGE, file=sys.stderr)
    return 1


def create(disk: str, size: str | None, base: str | None, source: str | None) -> int:
    """Create an image of `size`, over `base`, or as a copy of `source`; return the exit status."""
    try:
        _create(parse_disk(disk), disk, size, base, source)
    except (_RefusedError, VmmError) as err:
        return _fail(str(err))
    return 0


def _create(
    target: DiskFile, named: str, size: str | None, base: str | None, source: str | None
) -> None:
    number = None if size is None else _disk_size(size)
    if base is not None and source is not None:
        raise _RefusedError("conflicting -b and -i arguments")
    if base is not None and target.disk_format is not Format.QCOW2:
        raise _RefusedError("base images require qcow2 disk format")
    if source is not None:
        _convert(parse_disk(source), target, number)
    else:
        if base is not None:
            number = _size_over_base(base, target.path, number)
        if number is None:
            print(f"could not create {named}: missing size argument", file=sys.stderr)
            create_usage()
            raise _RefusedError("")
        try:
            if base is None:
                create_image(target.path, target.disk_format, number)
            else:
                create_qcow2(target.path, number, base)
        except (OSError, ValueError) as err:
            raise _RefusedError(f"create imagefile operation failed: {_reason(err)}") from err
    _warn(f"{target.disk_format} imagefile created")


def _disk_size(text: str) -> int:
    """Read the argument of -s; it is rounded down to whole megabytes.

    Source: section 3.5, size rules.
    """
    try:
        size = scan_scaled(text)
    except SizeError as err:
        raise _RefusedError(f"invalid disk size: {text}: {err}") from err
    if size < _MIB:
        raise _RefusedError("disk size must be at least 1MB")
    if size % _MIB:
        size -= size % _MIB
        _warn(f"disk size rounded to {fmt_scaled(size)}")
    return size


def _size_over_base(base: str, path: str, size: int | None) -> int:
    """Return the size of a new image over `base`, whose header alone is looked at."""
    try:
        with Path(path).parent.joinpath(base).open("rb") as file:
            data = file.read(1 << 16)
    except (OSError, ValueError) as err:
        raise _RefusedError(f"failure to read base image header: {_reason(err)}") from err
    if probe(data) is not Format.QCOW2:
        short = len(data) < 4
        raise _RefusedError(
            "failure to read base image header" if short else "base image is not a qcow2 file"
        )
    try:
        header = parse_header(data)
    except ImageError as err:
        raise _RefusedError(f"failure to read base image header: {err}") from err
    if size is not None and size != header.size:
        raise _RefusedError("base size does not match requested size")
    if not header.size:
        raise _RefusedError("missing disk size")
    return header.size


def _convert(source: DiskFile, target: DiskFile, size: int | None) -> None:
    """Copy a disk, with what its bases hold, to a new image of whole megabytes."""
    try:
        image = open_image(source.path, source.disk_format, True)
    except ImageError as err:
        raise _RefusedError(f"{err}\nfailed to open source image file") from err
    try:
        if size is None:
            size = image.size
        if size < image.size:
            raise _RefusedError("size cannot be smaller than input disk size")
        rounded = rounded_up(size)
        try:
            create_image(target.path, target.disk_format, rounded)
        except (OSError, ValueError) as err:
            reason = f"{target.path}: {_reason(err)}"
            raise _RefusedError(f"{reason}\nfailed to create destination image file") from err
        is_whole = False
        try:
            with _progress(image.size) as advance:
                copy(image, target.path, target.disk_format, advance)
            is_whole = True
        except ImageError as err:
            raise _RefusedError(f"{err}\nfailed to open destination image file") from err
        except SourceError as err:
            reason = f"{source.path}: {_reason(err)}"
            raise _RefusedError(f"{reason}\nfailed to read from source") from err
        except OSError as err:
            reason = f"{target.path}: {_reason(err)}"
            raise _RefusedError(f"{reason}\nfailed to write to destination") from err
        finally:
            if not is_whole:
                Path(target.path).unlink()
    finally:
        image.close()
    if rounded != size:
        _warn(f"destination size rounded to {rounded // _MIB} megabytes")


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """Yield what takes the number of bytes done; a person sees it if it is going to take long."""
    if size < _LONG_COPY or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal gets a bar
    from rich.progress import (  # noqa: PLC0415 - same
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(BarColumn(), DownloadColumn(binary_units=True)),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("copy", total=size)
        yield lambda done: bar.advance(task, done)


# vmctl image


def info(disk: str, *, as_json: bool) -> int:
    """Tell what an image is, without locking it; return the exit status."""
    named = parse_disk(disk)
    try:
        facts = _facts(named)
    except (VmmError, OSError) as err:
        return _fail(str(err))
    _show(facts, as_json=as_json)
    return 0


def check_image(disk: str, *, as_json: bool) -> int:
    """Tell whether an image is sound; return the exit status."""
    named = parse_disk(disk)
    facts: Facts = {"path": named.path, "format": named.disk_format.value}
    errors: tuple[str, ...] = ()
    try:
        with _opened(named.path) as file:
            lock(file.fd, named.path, writes=False)
            if named.disk_format is Format.QCOW2:
                header = read_header(file)
                report = check(file, header)
                errors = report.errors
                total = -(-header.size >> header.cluster_bits)
                facts |= {
                    "errors": report.error_count,
                    "leaked_clusters": report.leaked_clusters,
                    "leaked_bytes": report.leaked_clusters << header.cluster_bits,
                    "data_clusters": report.data_clusters,
                    "compressed_clusters": report.compressed_clusters,
                    "total_clusters": total,
                    "was_closed": not header.incompatible & Incompatible.DIRTY,
                    "marked_corrupt": bool(header.incompatible & Incompatible.CORRUPT),
                    "findings": list(errors),
                }
    except (VmmError, OSError) as err:
        return _fail(str(err))
    if as_json:
        _show(facts, as_json=True)
    else:
        facts.pop("findings", None)
        _show(facts, as_json=False)
        for error in errors:
            print(f"error: {error}")
    return 1 if errors or facts.get("marked_corrupt") else 0


def _facts(named: DiskFile) -> Facts:
    with _opened(named.path) as file:
        facts: Facts = {"path": named.path, "format": named.disk_format.value}
        if named.disk_format is Format.QCOW2:
            header = read_header(file)
            facts["virtual_size"] = header.size
            _add_usage(facts, file)
            _add_header(facts, header)
            facts["snapshots"] = [s.name for s in read_snapshots(file, header)[0]]
        else:
            facts["virtual_size"] = file.size()
            _add_usage(facts, file)
    if named.disk_format is Format.QCOW2 and facts["base"] is not None:
        try:
            chain = image_chain(named.path, named.disk_format)
        except ImageError as err:
            facts["base_error"] = str(err)
        else:
            facts["bases"] = [f"{layer.disk_format}:{layer.source}" for layer in chain[1:]]
    return facts


def _add_usage(facts: Facts, file: HostFile) -> None:
    status = os.fstat(file.fd)
    facts["file_size"] = file.size()
    facts["disk_size"] = status.st_blocks * 512


def _add_header(facts: Facts, header: Header) -> None:
    facts |= {
        "version": header.version,
        "cluster_size": header.cluster_size,
        "refcount_bits": header.refcount_bits,
        "compression": header.compression.name.lower(),
        "extended_l2": header.has_subclusters,
        "lazy_refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
        "was_closed": not header.incompatible & Incompatible.DIRTY,
        "marked_corrupt": bool(header.incompatible & Incompatible.CORRUPT),
        "base": header.backing.path if header.backing else None,
        "base_format": header.backing.disk_format if header.backing else None,
    }


@contextmanager
def _opened(path: str) -> Iterator[HostFile]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as err:
        raise ImageError(f"{path}: {_reason(err)}") from err
    try:
        yield HostFile(descriptor, path, is_read_only=True)
    except OSError as err:
        raise ImageError(f"{path}: {_reason(err)}") from err
    finally:
        os.close(descriptor)


_SIZES = {"virtual_size", "file_size", "disk_size", "cluster_size", "leaked_bytes"}


def _show(facts: Facts, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    rows = [(name.replace("_", " "), _text(name, value)) for name, value in facts.items()]
    if not sys.stdout.isatty():
        for name, text in rows:
            print(f"{name + ':':20} {text}".rstrip())
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal gets a table
    from rich.table import Table  # noqa: PLC0415 - same
    from rich.text import Text  # noqa: PLC0415 - same

    table = Table(box=None, pad_edge=False, show_header=False)
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    Console().print(table)


def _text(name: str, value: str | int | bool | list[str] | None) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int() if name in _SIZES:
            return f"{fmt_scaled(value)} ({value} bytes)"
        case list():
            return ", ".join(value) or "none"
        case _:
            return str(value)


def _reason(err: OSError | ValueError) -> str:
    return (err.strerror or str(err)) if isinstance(err, OSError) else str(err)


def _fail(lines: str) -> int:
    for line in lines.splitlines():
        _warn(line)
    return 1


def _warn(line: str) -> None:
    print(f"vmctl: {line}", file=sys.stderr)
