"""Jobs over many hosts by Dask distributed, each in a fresh virtual machine. See docs/fleet.md.

Dask schedules, transports and retries. This package makes the machine of a job on the host to which
Dask has sent it, and ends it.
"""

from vmm_fleet.jobs import InVm

__all__ = ("InVm",)
