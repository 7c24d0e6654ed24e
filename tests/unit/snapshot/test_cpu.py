"""Requirements of a guest for a new host's processor, in OpenBSD's words."""

from __future__ import annotations

import pytest

from tests.unit.snapshot.samples import CPUID
from vmm_kvm.errors import SnapshotError
from vmm_kvm.kvm.cpuid import CpuidEntry
from vmm_kvm.snapshot.cpu import CpuidRecord, check_cpuid, cpuid_records

NAMES = {0x0: 0, 0x1: 1, 0x7: 2, 0xD: 3, 0x80000001: 4}


def with_register(code: int, register: str, value: int) -> list[CpuidRecord]:
    """Return the sample with another value in one register."""
    found = list(CPUID)
    at = NAMES[code]
    found[at] = CpuidRecord(**{**found[at]._asdict(), register: value})
    return found


def test_a_guest_goes_on_with_the_same_processor() -> None:
    """The processor that the guest has seen is accepted."""
    check_cpuid(CPUID, CPUID)


def test_a_better_processor_will_do() -> None:
    """A higher level, more features and more room are accepted."""
    better = [one._replace(c=one.c | 1 << 31, d=one.d | 1 << 31) for one in CPUID]
    better[0] = CPUID[0]._replace(a=99)
    better[3] = CPUID[3]._replace(b=9999, c=9999)
    check_cpuid(CPUID, better)


@pytest.mark.parametrize(
    ("code", "register", "value", "message"),
    [
        (0x0, "a", 12, "incompatible cpuid level"),
        (0x0, "b", 0, "incompatible cpu brand"),
        (0x0, "c", 0, "incompatible cpu brand"),
        (0x0, "d", 0, "incompatible cpu brand"),
        (
            0x1,
            "c",
            CPUID[1].c & ~(1 << 28),
            "incompatible cpu features code: 0x1 leaf: 0x0  reg: c (ecx lacks 0x10000000)",
        ),
        (0x1, "d", 0, "incompatible cpu features code: 0x1 leaf: 0x0  reg: d (edx lacks "),
        (0x7, "b", 0, "incompatible cpu features code: 0x7 leaf: 0x0  reg: c (ebx lacks "),
        (0x7, "c", 0, "incompatible cpu features code: 0x7 leaf: 0x0  reg: d (ecx lacks 0x40)"),
        (
            0xD,
            "b",
            0x240,
            "incompatible cpu: insufficient max save area for enabled XCR0 features",
        ),
        (
            0xD,
            "c",
            0x240,
            "incompatible cpu: insufficient max save area for supported XCR0 features",
        ),
        (
            0x80000001,
            "c",
            0,
            "incompatible cpu features code: 0x80000001 leaf: 0x0  reg: c (ecx lacks 0x121)",
        ),
        (
            0x80000001,
            "d",
            0,
            "incompatible cpu features code: 0x80000001 leaf: 0x0  reg: d (edx lacks 0x2c100800)",
        ),
    ],
)
def test_what_a_processor_lacks_is_told(code: int, register: str, value: int, message: str) -> None:
    """Each compared register has its line, as OpenBSD's vmd logs it."""
    with pytest.raises(SnapshotError) as caught:
        check_cpuid(CPUID, with_register(code, register, value))
    assert str(caught.value).startswith(message)


def test_the_signature_of_amd_processors_is_compared() -> None:
    """As in OpenBSD, eax of leaf 0x80000001 is compared as a set of features too."""
    sender = with_register(0x80000001, "a", 0x800F12)
    with pytest.raises(SnapshotError, match=r"reg: a \(eax lacks 0x800f12\)"):
        check_cpuid(sender, CPUID)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (CpuidRecord(7, 1, 0, 0, 0, 0), "invalid leaf 0x1 for code 0x7"),
        (CpuidRecord(2, 0, 0, 0, 0, 0), "unknown code 0x2"),
    ],
)
def test_what_is_not_compared_is_refused(record: CpuidRecord, message: str) -> None:
    """A stream with leaves that are not compared is refused."""
    with pytest.raises(SnapshotError) as caught:
        check_cpuid([record], CPUID)
    assert str(caught.value) == message


def test_the_first_difference_is_told() -> None:
    """Records are compared in OpenBSD's order, and the registers of each too."""
    worse = [one._replace(a=0, b=0, c=0, d=0) for one in CPUID]
    with pytest.raises(SnapshotError, match="incompatible cpuid level"):
        check_cpuid(CPUID, worse)


def test_a_leaf_that_is_missing_is_zeros() -> None:
    """A missing leaf of a vCPU counts as zeros; only the first subleaf is compared."""
    entries = [CpuidEntry(7, 0, 1, 1, 2, 3, 4), CpuidEntry(7, 1, 1, 5, 6, 7, 8)]
    assert cpuid_records(entries) == (
        CpuidRecord(0, 0, 0, 0, 0, 0),
        CpuidRecord(1, 0, 0, 0, 0, 0),
        CpuidRecord(7, 0, 1, 2, 3, 4),
        CpuidRecord(0xD, 0, 0, 0, 0, 0),
        CpuidRecord(0x80000001, 0, 0, 0, 0, 0),
    )
