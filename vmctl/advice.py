"""Advice about a daemon that cannot be reached, and about access to one."""

import os
from collections.abc import Callable, Sequence


def advice(path: str, err: OSError) -> list[str]:
    """Return advice about a daemon that cannot be reached."""
    if isinstance(err, FileNotFoundError | ConnectionRefusedError):
        return ["vmd is not running: 'systemctl start vmd', or 'vmd --user' for VMs of your own"]
    if not isinstance(err, PermissionError):
        return []
    who = may_connect(path)
    return [f"{who}: see 'socket owner' in vm.conf(5)"] if who else []


def may_connect(path: str) -> str:
    """Return the users who may connect to the socket at `path`, in words; empty if unknown."""
    import grp  # noqa: PLC0415 - only for this
    import pwd  # noqa: PLC0415 - the same

    def name_of(number: int, find: Callable[[int], Sequence[object]]) -> str:
        try:
            return str(find(number)[0])
        except KeyError:
            return str(number)

    try:
        found = os.stat(path)
    except OSError:  # a directory on the way is closed to us
        return ""
    if found.st_mode & 0o002:
        return "everybody may connect"
    users = ["root", name_of(found.st_uid, pwd.getpwuid)] if found.st_uid else ["root"]
    if not found.st_mode & 0o020:
        return f"only {' and '.join(users)} may connect"
    group = name_of(found.st_gid, grp.getgrgid)
    return f"only {', '.join(users)} and the group {group} may connect"
