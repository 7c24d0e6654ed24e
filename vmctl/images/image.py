"""`vmctl image`: describe, check and resize disk images.

Exit status: 0 on success, 1 on any failure, and from `check` 1 if the image is not sound.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vmctl.images.disk_files import DiskFile, parse_disk, reason, set_up_logging
from vmctl.images.store import PREFIX
from vmctl.messages import fail
from vmd.config.sizes import fmt_scaled
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.block.locks import lock
from vmm_kvm.block.qcow2.header import Compatible, Header, Incompatible, read_header
from vmm_kvm.block.qcow2.snapshots import read_snapshots
from vmm_kvm.errors import ImageError, VmmError
from vmm_kvm.images.opening import check_kind, image_chain
from vmm_kvm.text import printable

Facts = dict[str, str | int | bool | list[str] | None]


def info(words: Sequence[str], *, as_json: bool = False) -> int:
    """Describe an image, without locking it; return the exit status."""
    set_up_logging()
    try:
        facts = _facts(parse_disk(words[0]))
    except (VmmError, OSError) as err:
        return fail(str(err))
    _show(facts, as_json=as_json)
    return 0


def check_image(words: Sequence[str], *, as_json: bool = False) -> int:
    """Check an image; return the exit status."""
    set_up_logging()
    try:
        named = parse_disk(words[0])
    except VmmError as err:
        return fail(str(err))
    facts: Facts = {"path": named.path, "format": named.disk_format.value}
    errors: tuple[str, ...] = ()
    try:
        with _opened(named.path) as file:
            lock(file.fd, named.path, writes=False)
            if named.disk_format is Format.QCOW2:
                from vmm_kvm.block.qcow2.check import check  # noqa: PLC0415 - only for this

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
            print(f"error: {printable(error)}")
    return 1 if errors or facts.get("marked_corrupt") else 0


def resize_image(words: Sequence[str], *, shrink: bool = False) -> int:
    """Resize an image, `words[0]`, to the size `words[1]`; return the exit status."""
    from vmctl.images.create import RefusedError, disk_size  # noqa: PLC0415 - only for this
    from vmm_kvm.images.resize import resize  # noqa: PLC0415 - the same

    set_up_logging()
    try:
        if words[1].startswith("+"):
            return fail(f"{words[1]}: a size is the whole disk's, not what is added to it")
        if words[0].startswith(PREFIX):
            return fail(f"{words[0]}: images of the store are not changed")
        named, size = parse_disk(words[0]), disk_size(words[1])
        resize(named.path, named.disk_format, size, may_shrink=shrink)
    except (RefusedError, VmmError) as err:
        return fail(str(err))
    except OSError as err:
        return fail(f"{words[0]}: {reason(err)}")
    return 0


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
        check_kind(descriptor, path)
        yield HostFile(descriptor, path, is_read_only=True)
    except OSError as err:
        raise ImageError(f"{path}: {reason(err)}") from err
    finally:
        os.close(descriptor)


_SIZES = {"virtual_size", "file_size", "disk_size", "cluster_size", "leaked_bytes"}


def _show(facts: Facts, *, as_json: bool) -> None:
    if as_json:
        import json  # noqa: PLC0415 - only for this

        print(json.dumps(facts, indent=2))
        return
    rows = [(f"{name.replace('_', ' ')}:", _text(name, value)) for name, value in facts.items()]
    if sys.stdout.isatty():
        from vmctl.screen.table import show_facts  # noqa: PLC0415 - only people see it

        show_facts(rows)
        return
    for name, text in rows:
        print(f"{name:20} {printable(text)}".rstrip())


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
