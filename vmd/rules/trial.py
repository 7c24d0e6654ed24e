"""A trial registration of a configuration's VMs, for `vmd -n`."""

from collections.abc import Sequence

from vmd.config.model import Staggered, VmConfig
from vmd.rules.policy import Users
from vmd.rules.registry import Registry


class _NoClock:
    """Time for a registry in which nothing happens."""

    def monotonic_s(self) -> float:
        """Return the beginning of time."""
        return 0.0

    realtime_s = monotonic_s


def trial(vms: Sequence[VmConfig]) -> list[str]:
    """Return why VMs of a configuration would be refused, a line each, for an administrator."""
    users = Users(frozenset({0}), lambda _uid, _gid: False)
    return Registry(users, _NoClock(), Staggered(1, 0), b"").judge(vms)
