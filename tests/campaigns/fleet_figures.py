"""What a campaign over two hosts has measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class Figures(NamedTuple):
    """See the module."""

    jobs: int
    results: Counter[str]
    """By host."""
    begun: int
    """Calls of jobs, of which more than one may be of the same job."""
    peaks: Mapping[str, int]
    """The most machines at a time, by host, with a template where there is one."""
    looks: int
    seconds: float
    memory: int
    """MiB of a machine."""
    lost: str
    """What was killed."""
    declared: str
    """Memory that a host declares."""

    def __str__(self) -> str:
        most = {name: f"{peak * self.memory} MiB" for name, peak in self.peaks.items()}
        told = ", ".join(f"{name} {number}" for name, number in sorted(self.results.items()))
        return (
            f"{self.jobs} jobs, {sum(self.results.values())} results, one each ({told}); "
            f"{self.begun} begun; {self.lost} killed; memory at most {most}, {self.declared}, in "
            f"{self.looks} looks; 0 VMs left; {self.seconds:.1f} s"
        )
