"""CPUID of a vCPU, from made-up tables of an Intel and an AMD host."""

from __future__ import annotations

import pytest

from vmm_kvm.arch.x86.cpuid import KVM_CPUID_FEATURES, KVM_CPUID_SIGNATURE, guest_cpuid
from vmm_kvm.kvm.cpuid import ECX1_TSC_DEADLINE, SIGNIFICANT_INDEX, CpuidEntry

_L1_DATA = 1 | 1 << 5
_L2 = 3 | 2 << 5
_L3 = 3 | 3 << 5


def _leaf(function: int, *registers: int, index: int | None = None) -> CpuidEntry:
    eax, ebx, ecx, edx = (*registers, 0, 0, 0, 0)[:4]
    flags = 0 if index is None else SIGNIFICANT_INDEX
    return CpuidEntry(function, index or 0, flags, eax, ebx, ecx, edx)


def _vendor_leaf(highest: int, vendor: bytes) -> CpuidEntry:
    ebx, edx, ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    return _leaf(0, highest, ebx, ecx, edx)


INTEL = (
    _vendor_leaf(0x1F, b"GenuineIntel"),
    # A host of 16 threads, read on CPU 5, HTT on, OSXSAVE on; CLFLUSH line size 8.
    _leaf(1, 0x806F8, 0x05_10_08_00, 1 << 27 | ECX1_TSC_DEADLINE | 1, 1 << 28 | 1),
    _leaf(4, 7 << 26 | 1 << 14 | _L1_DATA, 0x2C0003F, 63, index=0),
    _leaf(4, 7 << 26 | 1 << 14 | _L2, 0x3C0003F, 2047, index=1),
    _leaf(4, 7 << 26 | 15 << 14 | _L3, 0x3C0003F, 8191, index=2),
    _leaf(4, 0, index=3),
    _leaf(7, 0, 0x2129, index=0),
    _leaf(0xB, 1, 2, 0x100, 5, index=0),
    _leaf(0xB, 4, 16, 0x201, 5, index=1),
    _leaf(0x15, 2, 200, 24_000_000),
    _leaf(0x16, 2600, 3500, 100),
    _leaf(0x1F, 1, 2, 0x100, 5, index=0),
    _leaf(KVM_CPUID_SIGNATURE, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D),
    _leaf(KVM_CPUID_FEATURES, 0x0100_7EFB),
    _leaf(0x8000_0000, 0x8000_0008),
    _leaf(0x8000_0008, 0x3039, 0, 0x7777),
)
AMD = (
    _vendor_leaf(0x10, b"AuthenticAMD"),
    _leaf(1, 0xA20F12, 0x03_20_08_00, 1, 1),
    _leaf(7, 0, 0x2129, index=0),
    _leaf(0x8000_0000, 0x8000_001F),
    _leaf(0x8000_0001, 0xA20F12, 0, 1 << 22, 0),
    _leaf(0x8000_0007, 0, 0, 0, 1 << 8),
    _leaf(0x8000_0008, 0x3030, 0, 7 << 12 | 31),
    _leaf(0x8000_001D, 1 << 14 | _L1_DATA, 1, 2, index=0),
    _leaf(0x8000_001D, 31 << 14 | _L3, 1, 2, index=1),
    _leaf(0x8000_001D, 0, index=2),
    _leaf(0x8000_001E, 3, 0x101, 0x200),
    _leaf(0x8000_0026, 1, 2, 0x100, 3, index=0),
)


def _find(entries: tuple[CpuidEntry, ...], function: int, index: int = 0) -> CpuidEntry:
    found = [e for e in entries if e.function == function and e.subleaf == index]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("table", [INTEL, AMD])
@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (2, 4), (6, 7), (63, 64)])
def test_apic_id_and_count(table: tuple[CpuidEntry, ...], index: int, count: int) -> None:
    """Leaf 1 has the vCPU's APIC id and the number of vCPUs, and HTT from two on."""
    leaf = _find(guest_cpuid(table, index, count), 1)
    assert index == leaf.ebx >> 24
    assert count == leaf.ebx >> 16 & 0xFF
    assert leaf.ebx & 0xFFFF == 0x0800
    assert (count > 1) == bool(leaf.edx & 1 << 28)


@pytest.mark.parametrize("table", [INTEL, AMD])
def test_feature_bits(table: tuple[CpuidEntry, ...]) -> None:
    """A guest sees a hypervisor and x2APIC, not the host's OSXSAVE, and keeps other bits."""
    leaf = _find(guest_cpuid(table, 0, 1), 1)
    assert leaf.ecx & 1 << 31
    assert leaf.ecx & 1 << 21
    assert not leaf.ecx & 1 << 27
    assert leaf.ecx & 1
    assert _find(table, 7).ebx == _find(guest_cpuid(table, 0, 1), 7).ebx


def test_tsc_deadline_is_kept() -> None:
    """The guest has the TSC-deadline timer exactly if the supported table has it."""
    assert _find(guest_cpuid(INTEL, 0, 1), 1).ecx & ECX1_TSC_DEADLINE
    assert not _find(guest_cpuid(AMD, 0, 1), 1).ecx & ECX1_TSC_DEADLINE


@pytest.mark.parametrize("table", [INTEL, AMD])
def test_kvm_leaves(table: tuple[CpuidEntry, ...]) -> None:
    """The KVM leaves exist whatever the supported table says, and name kvmclock."""
    entries = guest_cpuid(table, 0, 1)
    leaf = _find(entries, KVM_CPUID_SIGNATURE)
    signature = b"".join(r.to_bytes(4, "little") for r in (leaf.ebx, leaf.ecx, leaf.edx))
    assert signature == b"KVMKVMKVM\0\0\0"
    assert leaf.eax == KVM_CPUID_FEATURES
    features = _find(entries, KVM_CPUID_FEATURES)
    assert features.eax & (1 << 3 | 1 << 24) == 1 << 3 | 1 << 24


def test_kvm_features_of_the_host_are_kept() -> None:
    """KVM's feature leaf passes unchanged."""
    assert _find(guest_cpuid(INTEL, 0, 1), KVM_CPUID_FEATURES).eax == 0x0100_7EFB


@pytest.mark.parametrize(
    ("count", "width"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (64, 6)]
)
@pytest.mark.parametrize("function", [0xB, 0x1F])
def test_extended_topology(function: int, count: int, width: int) -> None:
    """Leaves 0xb and 0x1f report one thread per core, `count` cores, and the x2APIC id."""
    entries = guest_cpuid(INTEL, count - 1, count)
    threads, cores, end = (_find(entries, function, index) for index in range(3))
    flags = SIGNIFICANT_INDEX
    assert threads == CpuidEntry(function, 0, flags, 0, 1, 0x100, count - 1)
    assert cores == CpuidEntry(function, 1, flags, width, count, 0x201, count - 1)
    assert end == CpuidEntry(function, 2, flags, 0, 0, 2, count - 1)


def test_extended_topology_without_the_hosts() -> None:
    """An AMD table gets leaf 0xb, because its highest leaf is beyond, but no leaf 0x1f."""
    functions = {e.function for e in guest_cpuid(AMD, 0, 2)}
    assert 0xB in functions
    assert 0x1F not in functions


@pytest.mark.parametrize(("count", "ids"), [(1, 0), (2, 1), (3, 3), (4, 3), (6, 7), (64, 63)])
def test_intel_caches(count: int, ids: int) -> None:
    """Leaf 4: each core has its own L1 and L2, all share the L3; its type and size stay."""
    entries = guest_cpuid(INTEL, 0, count)
    for index, kind in ((0, _L1_DATA), (1, _L2), (2, _L3)):
        leaf = _find(entries, 4, index)
        assert leaf.eax & 0x3FFF == kind
        assert leaf.eax >> 26 == ids
        assert leaf.eax >> 14 & 0xFFF == (ids if kind == _L3 else 0)
        assert leaf.ebx == _find(INTEL, 4, index).ebx
    assert _find(entries, 4, 3).eax == 0


@pytest.mark.parametrize(("count", "width"), [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)])
def test_amd_topology(count: int, width: int) -> None:
    """AMD's leaves have the number of cores, the width of an APIC id, and this core's number."""
    entries = guest_cpuid(AMD, count - 1, count)
    assert _find(entries, 0x8000_0008).ecx == width << 12 | count - 1
    assert _find(entries, 0x8000_0001).ecx == 1 << 22 | (2 if count > 1 else 0)
    leaf = _find(entries, 0x8000_001E)
    assert (leaf.eax, leaf.ebx, leaf.ecx) == (count - 1, count - 1, 0)
    assert _find(entries, 0x8000_001D, 0).eax == _L1_DATA
    assert _find(entries, 0x8000_001D, 1).eax == _L3 | count - 1 << 14
    assert _find(entries, 0x8000_001D, 2).eax == 0


def test_hosts_topology_is_left_out() -> None:
    """Leaf 0x80000026, the host's topology, is left out; Intel's 0x80000008 has no count."""
    assert 0x8000_0026 not in {e.function for e in guest_cpuid(AMD, 0, 2)}
    assert _find(guest_cpuid(INTEL, 0, 2), 0x8000_0008).ecx == 0


def test_frequencies_of_the_host_are_kept() -> None:
    """Leaves 0x15 and 0x16 pass unchanged if the host fills them in."""
    entries = guest_cpuid(INTEL, 0, 1, tsc_khz=2_600_000)
    assert _find(entries, 0x15) == _find(INTEL, 0x15)
    assert _find(entries, 0x16) == _find(INTEL, 0x16)


def test_half_filled_frequencies_are_left_out() -> None:
    """A TSC leaf without a ratio and a frequency leaf without a base are left out."""
    kept = [e for e in INTEL if e.function not in {0x15, 0x16}]
    table = (*kept, _leaf(0x15, 0, 0, 24_000_000), _leaf(0x16, 0, 3500, 100))
    entries = guest_cpuid(table, 0, 1)
    assert 0x15 not in {e.function for e in entries}
    assert _find(entries, 0x16) == _leaf(0x16)


def test_tsc_leaf_is_made_up_when_invariant() -> None:
    """With a known rate and an invariant TSC, leaf 0x15 gives that rate; without, it is absent."""
    invariant = [*INTEL, _leaf(0x8000_0007, 0, 0, 0, 1 << 8)]
    table = tuple(e for e in invariant if e.function != 0x15)
    leaf = _find(guest_cpuid(table, 0, 1, tsc_khz=2_600_000), 0x15)
    assert leaf.ecx * leaf.ebx // leaf.eax == 2_600_000_000
    without = tuple(e for e in table if e.function != 0x8000_0007)
    assert 0x15 not in {e.function for e in guest_cpuid(without, 0, 1, tsc_khz=2_600_000)}


@pytest.mark.parametrize("table", [INTEL, AMD])
def test_entries_are_unique_and_sorted(table: tuple[CpuidEntry, ...]) -> None:
    """Each leaf occurs once, and they are in order."""
    keys = [(e.function, e.subleaf) for e in guest_cpuid(table, 1, 4)]
    assert sorted(set(keys)) == keys
