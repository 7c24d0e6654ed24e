"""Check whether a machine can continue on another processor, in OpenBSD's order and words.

A guest inspects its processor once: the features that it found must exist where it continues. The
sender tells what its guest sees, the receiver what it would show a guest of its own.

Pure: two lists of records in, a line or nothing out.

Source: OpenBSD vmd/vmd.c, vmd_check_vmh; vmd/vmd.h, VM_DUMP_HEADER_CPUID_COUNT.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vmm_kvm.errors import SnapshotError
from vmm_kvm.kvm.cpuid import CpuidEntry
from vmm_kvm.state import U32

CPUID_RECORDS = 5
_LEVEL, _FEATURES, _EXTENDED, _SAVE_AREA, _AMD_FEATURES = 0x0, 0x1, 0x7, 0xD, 0x8000_0001
_CODES = (_LEVEL, _FEATURES, _EXTENDED, _SAVE_AREA, _AMD_FEATURES)


class CpuidRecord(NamedTuple):
    """CPUID's answer for one leaf; OpenBSD's `vmh_cpuids`."""

    code: U32
    leaf: U32
    """The subleaf; only 0 is possible."""
    a: U32
    b: U32
    c: U32
    d: U32


def cpuid_records(entries: Iterable[CpuidEntry]) -> tuple[CpuidRecord, ...]:
    """Return the leaves of a vCPU's CPUID that are compared; a missing one is all zeros."""
    found = {entry.function: entry for entry in entries if entry.subleaf == 0}
    records = []
    for code in _CODES:
        entry = found.get(code) or CpuidEntry(code, 0, 0, 0, 0, 0, 0)
        records.append(CpuidRecord(code, 0, entry.eax, entry.ebx, entry.ecx, entry.edx))
    return tuple(records)


def check_cpuid(sender: Iterable[CpuidRecord], receiver: Iterable[CpuidRecord]) -> None:
    """Refuse a guest whose processor had features that this one lacks.

    Raises:
        SnapshotError: in OpenBSD's words. Behind those of a missing feature stand the register and
            the bits that are missing: OpenBSD calls the registers of leaf 7 by each other's names.
    """
    own = {record.code: record for record in receiver}
    for record in sender:
        if record.leaf != 0:
            raise SnapshotError(f"invalid leaf {record.leaf:#x} for code {record.code:#x}")
        _check(record, own)


def _check(record: CpuidRecord, own: Mapping[int, CpuidRecord]) -> None:
    code = record.code
    host = own.get(code) or CpuidRecord(code, 0, 0, 0, 0, 0)
    match code:
        case 0x0:
            if record.a > host.a:
                raise SnapshotError("incompatible cpuid level")
            if record[3:] != host[3:]:
                raise SnapshotError("incompatible cpu brand")
        case 0x1:
            _check_features(record.c, host.c, code, "c", "ecx")
            _check_features(record.d, host.d, code, "d", "edx")
        case 0x7:
            _check_features(record.b, host.b, code, "c", "ebx")
            _check_features(record.c, host.c, code, "d", "ecx")
        case 0xD:
            for sent, here, which in (
                (record.b, host.b, "enabled"),
                (record.c, host.c, "supported"),
            ):
                if sent > here:
                    raise SnapshotError(
                        f"incompatible cpu: insufficient max save area for {which} XCR0 features"
                    )
        case 0x8000_0001:
            _check_features(record.a, host.a, code, "a", "eax")
            _check_features(record.c, host.c, code, "c", "ecx")
            _check_features(record.d, host.d, code, "d", "edx")
        case _:
            raise SnapshotError(f"unknown code {code:#x}")


def _check_features(sent: int, here: int, code: int, register: str, name: str) -> None:
    if missing := sent & ~here:
        raise SnapshotError(
            f"incompatible cpu features code: {code:#x} leaf: 0x0  reg: {register} "
            f"({name} lacks {missing:#x})"
        )
