"""The configuration as the parent reads it: errors are logged, and returned."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vmd.config.advice import advice
from vmd.config.host import Host, SystemHost
from vmd.config.model import Config, Owner, VmConfig
from vmd.config.parser import ConfigErrors, parse_config
from vmd.parent.cgroups import Cgroups
from vmd.parent.seeds import with_seeds
from vmd.rules.policy import Users
from vmm_kvm.log import Log

log = Log(__name__)


class Settings(NamedTuple):
    """Settings of the command line, for every reading of the configuration."""

    path: str
    macros: Mapping[str, str]
    is_optional: bool
    """The configuration file need not be there."""
    users: Users
    uid: int
    """The user for whom the configuration file speaks."""
    set_socket_owner: Callable[[Owner | None], None]
    address: str | bytes
    """Of the listening socket, as the kernel tells it."""
    state: str | None = None
    """Directory of what VMs keep."""
    cgroups: Cgroups | None = None
    """Control groups of VMs; None where there are none."""
    tpm_uids: Sequence[int] = ()
    """Users of swtpm processes; without any they stay the daemon's user."""
    is_user: bool = False
    """It is `vmd --user`, even if root runs it: there are no switches."""
    skips_broken: bool = False
    """VMs that name missing files, or are refused, are left out; the others start."""
    host_id: bytes = b""
    """This host's identity, of which lladdrs are made."""
    host: Host = SystemHost("/")
    """The host on which the configuration and its files are looked up."""


def read_configuration(
    settings: Settings,
    path: str,
    judge: Callable[[Sequence[VmConfig]], Sequence[str]],
    *,
    is_optional: bool,
) -> Config | tuple[str, ...]:
    """Read a vm.conf; or return its errors, a line each.

    `judge` returns a line for each VM that the registry would refuse. With `skips_broken`, such VMs
    and those that name missing files are warnings. `is_optional`: the file may be absent.
    """
    host = settings.host
    try:
        config = parse_config(
            path,
            settings.macros,
            is_optional=is_optional,
            skips_broken=settings.skips_broken,
            host=host,
        )
    except ConfigErrors as err:
        for line in (*err.warnings, *err.lines):
            log.warning("%s", line)
        return err.lines
    config = with_seeds(config, settings.state)
    refused = tuple(judge(config.vms))
    odd = advice(config, is_user=settings.is_user, memory_size=host.memory_size())
    for line in (*config.warnings, *odd, *refused):
        log.warning("%s", line)
    return config if settings.skips_broken else refused or config
