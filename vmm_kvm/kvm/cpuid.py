"""CPUID as KVM tells and takes it: a table of entries."""

from typing import NamedTuple

SIGNIFICANT_INDEX = 1 << 0
ECX1_TSC_DEADLINE = 1 << 24


class CpuidEntry(NamedTuple):
    """CPUID's answer for one leaf, or one subleaf if `flags` has SIGNIFICANT_INDEX."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int
