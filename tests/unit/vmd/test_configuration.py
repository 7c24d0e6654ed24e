"""The configuration as the parent reads it: errors are returned, warnings logged."""

from __future__ import annotations

import os

import pytest

from tests.unit.config.fake_host import FakeHost
from vmd.config.model import Config
from vmd.parent.configuration import Settings, read_configuration
from vmd.rules.policy import Users

TEXT = b'vm "a" {\n\tdisk "disk0.img"\n\tinterface { switch "up" }\n}\nvm "b" { disk "none.img" }\n'


def settings(*, is_user: bool = False, skips_broken: bool = False) -> Settings:
    """Return the settings of a daemon that this user runs, with a file of one broken VM."""
    return Settings(
        path="f",
        macros={},
        is_optional=False,
        users=Users(frozenset({os.getuid()}), lambda _uid, _gid: False),
        uid=os.getuid(),
        set_socket_owner=lambda _owner: None,
        address="/run/vmd.sock",
        is_user=is_user,
        skips_broken=skips_broken,
        host=FakeHost({"f": TEXT}),
    )


def test_what_is_wrong_is_returned() -> None:
    """A file with a mistake is not used at all, unless broken VMs are skipped."""
    read = read_configuration(settings(), "f", lambda _vms: (), is_optional=False)
    assert read == (
        "disk none.img: No such file or directory",
        "f:5: failed to parse disks: none.img",
    )
    left = read_configuration(
        settings(skips_broken=True), "f", lambda _vms: ("refused",), is_optional=False
    )
    assert isinstance(left, Config)
    assert [vm.name for vm in left.vms] == ["a"]


@pytest.mark.parametrize(
    ("is_user", "text"), [(True, "vmd --user has local"), (False, "is not defined")]
)
def test_switches_of_a_daemon_without_privileges(
    caplog: pytest.LogCaptureFixture, is_user: bool, text: str
) -> None:
    """The log of `vmd --user`, root's too, says that there are no switches."""
    read_configuration(
        settings(is_user=is_user, skips_broken=True), "f", lambda _vms: (), is_optional=False
    )
    assert text in caplog.text
