"""`vmctl image info` and `vmctl image check`: what a disk image is, and whether it is sound.

Exit status: 0 on success, 1 on any failure, and from `check` 1 if the image is not sound.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from vmd.config.sizes import fmt_scaled
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.block.locks import lock
from vmm_kvm.block.qcow2.check import check
from vmm_kvm.block.qcow2.header import Compatible, Header, Incompatible, read_header
from vmm_kvm.block.qcow2.snapshots import read_snapshots
from vmm_kvm.errors import ImageError, VmmError
from vmm_kvm.images.opening import image_chain, probe

Facts = dict[str, str | int | bool | list[str] | None]


class DiskFile(NamedTuple):
    """What an argument that names a disk stands for."""

    path: str
    disk_format: Format


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


def info(disk: str, *, as_json: bool, verbose: bool) -> int:
    """Tell what an image is, without locking it; return the exit status."""
    set_up_logging(verbose=verbose)
    named = parse_disk(disk)
    try:
        facts = _facts(named)
    except (VmmError, OSError) as err:
        return fail(str(err))
    _show(facts, as_json=as_json)
    return 0


def check_image(disk: str, *, as_json: bool, verbose: bool) -> int:
    """Tell whether an image is sound; return the exit status."""
    set_up_logging(verbose=verbose)
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
        return fail(str(err))
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
        raise ImageError(f"{path}: {reason(err)}") from err
    try:
        yield HostFile(descriptor, path, is_read_only=True)
    except OSError as err:
        raise ImageError(f"{path}: {reason(err)}") from err
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


def reason(err: OSError | ValueError) -> str:
    """Return why a file could not be used."""
    return (err.strerror or str(err)) if isinstance(err, OSError) else str(err)


def fail(lines: str) -> int:
    """Print what has gone wrong; return the exit status."""
    for line in lines.splitlines():
        warn(line)
    return 1


def warn(line: str) -> None:
    """Print a line for the user on standard error."""
    print(f"vmctl: {line}", file=sys.stderr)
