"""CPUID of a vCPU: the host's features, KVM's own leaves, and a plain topology.

Pure: supported entries, vCPU index and vCPU count in, the vCPU's entries out. The topology is one
socket with as many cores as there are vCPUs, one thread each; a vCPU's APIC id is its index. On
OpenBSD the guest sees OpenBSDVMM58 and far fewer features; here it sees KVM and all that it can.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from vmm_kvm.kvm.cpuid import ECX1_TSC_DEADLINE, SIGNIFICANT_INDEX, CpuidEntry

KVM_CPUID_SIGNATURE = 0x4000_0000
KVM_CPUID_FEATURES = 0x4000_0001
_KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
_KVM_FEATURE_CLOCKSOURCE = 1 << 0
_KVM_FEATURE_CLOCKSOURCE2 = 1 << 3
_KVM_FEATURE_CLOCKSOURCE_STABLE = 1 << 24

_ECX1_X2APIC = 1 << 21
_ECX1_OSXSAVE = 1 << 27
_ECX1_HYPERVISOR = 1 << 31
_EDX1_APIC = 1 << 9
_EDX1_HTT = 1 << 28
_ECX_AMD1_CMP_LEGACY = 1 << 1
_EDX_APM_INVARIANT_TSC = 1 << 8
_EAX_SEV, _EAX_SEV_ES = 1 << 1, 1 << 3
_EBX_C_BIT = 0x3F

_REMEMBERED = 64  # vCPUs: machines made one after the other in a process are often alike
_LEVEL_SMT = 1
_LEVEL_CORE = 2
_CACHE_LEVEL_SHARED = 3  # the last level is the socket's, the others are each core's
_AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")


@lru_cache(_REMEMBERED)
def guest_cpuid(
    supported: tuple[CpuidEntry, ...], index: int, count: int, *, tsc_khz: int | None = None
) -> tuple[CpuidEntry, ...]:
    """Return the entries for vCPU `index` of `count`, out of what KVM supports.

    `supported` is what `Kvm.supported_cpuid` returns. With `tsc_khz`, the rate of the vCPU's TSC,
    leaf 0x15 tells it where the host's own is missing and the TSC is invariant.

    Source: Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E; Linux virt/kvm/x86/cpuid.rst.
    """
    topology = _Topology(index, count, is_amd=_vendor(supported) in _AMD_VENDORS)
    highest = max((e.function for e in supported if e.function < KVM_CPUID_SIGNATURE), default=0)
    basic = next((e.eax for e in supported if e.function == 0), highest)
    entries = [topology.adjust(e) for e in supported if e.function not in _GENERATED]
    if basic >= _LEAF_TOPOLOGY:
        entries += topology.leaf(_LEAF_TOPOLOGY)
    if basic >= _LEAF_TOPOLOGY_V2:
        entries += topology.leaf(_LEAF_TOPOLOGY_V2)
    entries += _kvm_leaves(supported)
    if basic >= _LEAF_TSC:
        entries += _tsc_leaf(supported, tsc_khz)
    return tuple(sorted(entries, key=lambda e: (e.function, e.subleaf)))


def without_apic(entries: Sequence[CpuidEntry]) -> tuple[CpuidEntry, ...]:
    """Return the entries of a vCPU for one that has no local APIC."""
    return tuple(
        entry._replace(
            ecx=entry.ecx & ~(_ECX1_X2APIC | ECX1_TSC_DEADLINE), edx=entry.edx & ~_EDX1_APIC
        )
        if entry.function == 1
        else entry
        for entry in entries
    )


def with_encryption(
    entries: Sequence[CpuidEntry], c_bit: int, *, is_es: bool
) -> tuple[CpuidEntry, ...]:
    """Return the entries of a vCPU whose memory, and with `is_es` registers, are encrypted."""
    features = _EAX_SEV | (_EAX_SEV_ES if is_es else 0)
    leaf = CpuidEntry(_LEAF_ENCRYPTION, 0, 0, features, c_bit, 0, 0)
    others = (
        one._replace(eax=max(one.eax, _LEAF_ENCRYPTION)) if one.function == _LEAF_EXTENDED else one
        for one in entries
        if one.function != _LEAF_ENCRYPTION
    )
    return tuple(sorted((*others, leaf), key=lambda e: (e.function, e.subleaf)))


def c_bit(supported: Sequence[CpuidEntry]) -> int | None:
    """Return the bit of an address that encrypts on this host; None without SEV."""
    for entry in supported:
        if entry.function == _LEAF_ENCRYPTION and entry.eax & _EAX_SEV:
            return entry.ebx & _EBX_C_BIT
    return None


_LEAF_TOPOLOGY = 0x0B
_LEAF_TOPOLOGY_V2 = 0x1F
_LEAF_TSC = 0x15
_LEAF_EXTENDED = 0x8000_0000
_LEAF_ENCRYPTION = 0x8000_001F
_LEAF_AMD_TOPOLOGY = 0x8000_0026

# Made anew, or left out: 0x8000_0026 tells the host's topology, and zeros make guests use 0x0b.
_GENERATED = frozenset(
    {
        _LEAF_TOPOLOGY,
        _LEAF_TOPOLOGY_V2,
        _LEAF_TSC,
        KVM_CPUID_SIGNATURE,
        KVM_CPUID_FEATURES,
        _LEAF_AMD_TOPOLOGY,
    }
)


def _vendor(supported: Sequence[CpuidEntry]) -> bytes:
    for entry in supported:
        if entry.function == 0:
            return b"".join(r.to_bytes(4, "little") for r in (entry.ebx, entry.edx, entry.ecx))
    return b""


class _Topology(NamedTuple):
    """One socket of `vcpus` cores, seen from the core whose APIC id is `apic_id`."""

    apic_id: int
    vcpus: int
    is_amd: bool

    @property
    def width(self) -> int:
        """How many bits of an APIC id tell the core."""
        return (self.vcpus - 1).bit_length()

    def adjust(self, entry: CpuidEntry) -> CpuidEntry:
        """Return `entry` with the host's topology replaced by this one."""
        match entry.function:
            case 0x1:
                return self._features(entry)
            case 0x4:
                return self._intel_cache(entry)
            case 0x16 if entry.eax == 0:  # no base frequency: then the others mean nothing
                return entry._replace(eax=0, ebx=0, ecx=0)
            case 0x8000_0001 if self.is_amd:
                legacy = _ECX_AMD1_CMP_LEGACY if self.vcpus > 1 else 0
                return entry._replace(ecx=entry.ecx & ~_ECX_AMD1_CMP_LEGACY | legacy)
            case 0x8000_0008:
                cores = self.width << 12 | min(self.vcpus - 1, 0xFF) if self.is_amd else 0
                return entry._replace(ecx=cores)
            case 0x8000_001D:
                return self._amd_cache(entry)
            case 0x8000_001E:
                return entry._replace(eax=self.apic_id, ebx=self.apic_id & 0xFF, ecx=0)
            case _ if (
                entry.function == _LEAF_ENCRYPTION
            ):  # memory that is not encrypted: Linux would read an MSR that is not
                return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
        return entry

    def leaf(self, function: int) -> Iterator[CpuidEntry]:
        """Yield the subleaves of leaf 0x0b or 0x1f: threads, cores, end."""
        levels = (
            (0, 1, _LEVEL_SMT),
            (self.width, self.vcpus, _LEVEL_CORE),
            (0, 0, 0),
        )
        for index, (shift, processors, level) in enumerate(levels):
            yield CpuidEntry(
                function,
                index,
                SIGNIFICANT_INDEX,
                shift,
                processors,
                level << 8 | index,
                self.apic_id,
            )

    def _features(self, entry: CpuidEntry) -> CpuidEntry:
        ebx = entry.ebx & 0xFFFF | min(self.vcpus, 0xFF) << 16 | (self.apic_id & 0xFF) << 24
        # OSXSAVE follows the guest's CR4, by KVM's hand.
        ecx = entry.ecx & ~_ECX1_OSXSAVE | _ECX1_HYPERVISOR | _ECX1_X2APIC
        edx = entry.edx & ~_EDX1_HTT | (_EDX1_HTT if self.vcpus > 1 else 0)
        return entry._replace(ebx=ebx, ecx=ecx, edx=edx)

    def _intel_cache(self, entry: CpuidEntry) -> CpuidEntry:
        if entry.eax & 0x1F == 0:  # no more caches
            return entry
        ids = (1 << self.width) - 1
        sharing = ids if entry.eax >> 5 & 0x7 >= _CACHE_LEVEL_SHARED else 0
        eax = entry.eax & 0x3FFF | min(sharing, 0xFFF) << 14 | min(ids, 0x3F) << 26
        return entry._replace(eax=eax)

    def _amd_cache(self, entry: CpuidEntry) -> CpuidEntry:
        if entry.eax & 0x1F == 0:
            return entry
        sharing = self.vcpus - 1 if entry.eax >> 5 & 0x7 >= _CACHE_LEVEL_SHARED else 0
        return entry._replace(eax=entry.eax & ~(0xFFF << 14) | min(sharing, 0xFFF) << 14)


def _kvm_leaves(supported: Sequence[CpuidEntry]) -> Iterator[CpuidEntry]:
    signature = [int.from_bytes(_KVM_SIGNATURE[i : i + 4], "little") for i in (0, 4, 8)]
    yield CpuidEntry(KVM_CPUID_SIGNATURE, 0, 0, KVM_CPUID_FEATURES, *signature)
    offered = [e for e in supported if e.function == KVM_CPUID_FEATURES]
    clock = _KVM_FEATURE_CLOCKSOURCE | _KVM_FEATURE_CLOCKSOURCE2 | _KVM_FEATURE_CLOCKSOURCE_STABLE
    yield offered[0] if offered else CpuidEntry(KVM_CPUID_FEATURES, 0, 0, clock, 0, 0, 0)


def _tsc_leaf(supported: Sequence[CpuidEntry], tsc_khz: int | None) -> Iterator[CpuidEntry]:
    is_invariant = any(
        e.function == 0x8000_0007 and e.edx & _EDX_APM_INVARIANT_TSC for e in supported
    )
    for entry in supported:
        if entry.function == _LEAF_TSC and entry.eax and entry.ebx:
            yield entry
            return
    if tsc_khz is not None and is_invariant:
        # As OpenBSD's vmm(4) makes it: a crystal of a hundredth of the TSC's rate.
        yield CpuidEntry(_LEAF_TSC, 0, 0, 1, 100, tsc_khz * 1000 // 100, 0)
