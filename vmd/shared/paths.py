"""Paths of the daemon's socket and configuration; nothing is opened here."""

import os
from collections.abc import Mapping
from contextlib import suppress

SYSTEM_SOCKET = "/run/vmd.sock"
"""OpenBSD's is /var/run/vmd.sock, which is the same place on Linux."""
SYSTEM_CONFIG = "/etc/vm.conf"
SYSTEM_STATE = "/var/lib/vmd"
_SOCKET_NAME = "vmd.sock"


def user_socket(environ: Mapping[str, str]) -> str | None:
    """Return the socket of `vmd --user`, None without a directory for it.

    Source: XDG base directory specification.
    """
    directory = environ.get("XDG_RUNTIME_DIR", "")
    return f"{directory}/{_SOCKET_NAME}" if directory.startswith("/") else None


def client_socket(environ: Mapping[str, str]) -> str:
    """Return the socket that commands connect to: VMD_SOCKET, else the user's own if it exists.

    For root the system's comes first. A socket of another user is none of ours, though the
    environment may name it, as after `sudo -E`: that user would be given our files.
    """
    given = environ.get("VMD_SOCKET")
    if given:
        return given
    own = user_socket(environ)
    if own and (os.getuid() or not os.path.exists(SYSTEM_SOCKET)):  # noqa: PTH110 - the plainest
        with suppress(OSError):
            if os.lstat(own).st_uid == os.getuid():
                return own
    return SYSTEM_SOCKET


def user_config(environ: Mapping[str, str]) -> str | None:
    """Return the configuration file of `vmd --user`, None without a home directory."""
    base = environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):
        home = environ.get("HOME", "")
        if not home.startswith("/"):
            return None
        base = f"{home}/.config"
    return f"{base}/vm.conf"


def state_directory(environ: Mapping[str, str], *, is_user: bool) -> str | None:
    """Return the directory of VMs' own files, None without a home directory.

    Source: systemd.exec(5), STATE_DIRECTORY; XDG base directory specification.
    """
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given.startswith("/"):
        return given
    if not is_user:
        return SYSTEM_STATE
    base = environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        home = environ.get("HOME", "")
        if not home.startswith("/"):
            return None
        base = f"{home}/.local/state"
    return f"{base}/vmd"
