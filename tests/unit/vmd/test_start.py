"""Checks of vmd before it starts: command line, service manager, socket, rights."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmd.config.model import Owner
from vmd.options import Options, UsageError, parse_options
from vmd.parent.listener import ListenerError, listen, present_owner, set_owner
from vmd.parent.service import Notifier, inherited_socket
from vmd.shared.paths import client_socket, user_config, user_socket


def test_options() -> None:
    """Flags may be joined, -v and -D may be repeated."""
    options = parse_options(["-dvv", "-D", "a=b", "-Dc=d", "-f", "x", "--user", "--socket", "s"])
    assert options == Options(
        is_foreground=True,
        verbosity=2,
        macros=("a=b", "c=d"),
        config="x",
        socket="s",
        is_user=True,
    )


@pytest.mark.parametrize("arguments", [["-x"], ["operand"], ["-f"], ["--socket"], ["--nothing"]])
def test_what_is_no_option(arguments: list[str]) -> None:
    """Anything else is answered with the usage."""
    with pytest.raises(UsageError):
        parse_options(arguments)


def test_where_an_ordinary_users_files_are() -> None:
    """Files follow the XDG directories; without any there are none."""
    assert user_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/vmd.sock"
    assert user_socket({}) is None
    assert user_config({"HOME": "/home/u"}) == "/home/u/.config/vm.conf"
    assert user_config({"HOME": "/home/u", "XDG_CONFIG_HOME": "/c"}) == "/c/vm.conf"
    assert user_config({}) is None


def test_which_daemon_commands_connect_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable's, the user's own, the system's; for root the system's before its own."""
    own, system = tmp_path / "vmd.sock", tmp_path / "system"
    monkeypatch.setattr("vmd.shared.paths.SYSTEM_SOCKET", str(system))
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    uid = tmp_path.stat().st_uid
    for user in (uid, uid or 1000):
        monkeypatch.setattr("os.getuid", lambda user=user: user)
        for there in (), (own,), (system,), (own, system):
            for path in own, system:
                path.unlink(missing_ok=True)
            for path in there:
                path.touch()
                os.chown(path, user, -1)
            is_own = own in there and (user != 0 or system not in there)
            assert client_socket(runtime) == str(own if is_own else system)
            assert client_socket({**runtime, "VMD_SOCKET": "/x"}) == "/x"
            assert client_socket({}) == str(system)


def test_another_users_daemon_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is kept from another user, as by `sudo -E`, names no daemon of ours."""
    (tmp_path / "vmd.sock").touch()
    monkeypatch.setattr("vmd.shared.paths.SYSTEM_SOCKET", str(tmp_path / "none"))
    for other in 0, os.getuid() + 1:
        monkeypatch.setattr("os.getuid", lambda other=other: other)
        own = tmp_path.stat().st_uid == other
        found = client_socket({"XDG_RUNTIME_DIR": str(tmp_path)})
        assert (found == str(tmp_path / "vmd.sock")) is own


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    """States go to the socket of the environment; without one nothing happens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    Notifier({}).notify("READY=1")


def test_sockets_for_others_are_not_taken() -> None:
    """Descriptors for another process are left alone."""
    assert inherited_socket({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) is None
    assert inherited_socket({}) is None


def test_a_socket_that_nobody_serves_is_replaced(tmp_path: Path) -> None:
    """A stale socket is replaced; one that a daemon serves is not, nor is any other file."""
    path = tmp_path / "s"
    listen(str(path)).close()
    with listen(str(path)):
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(ListenerError, match="another vmd serves it"):
            listen(str(path))
    path.unlink()
    path.write_text("")
    with pytest.raises(ListenerError, match="is there, and no socket"):
        listen(str(path))


def test_the_owner_of_a_socket_that_is_there(tmp_path: Path) -> None:
    """The service manager's owner of a socket can be read, and set again."""
    path = tmp_path / "socket"
    with listen(str(path)):
        present = present_owner(str(path))
        assert present == Owner(os.geteuid(), path.stat().st_gid)
        set_owner(str(path), present)
        assert present_owner(str(path)) == present


@pytest.mark.root
def test_another_user_is_let_in(tmp_path: Path) -> None:
    """A user and a group may connect to root's socket until it is another's; no others may."""
    tmp_path.chmod(0o755)
    path = tmp_path / "socket"

    def connects(uid: int, gid: int) -> bool:
        # pytest's own directories are closed to others: this child is in this one already.
        program = f"""
import os, socket
os.setgroups([]); os.setresgid({gid}, {gid}, {gid}); os.setresuid({uid}, {uid}, {uid})
try: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("socket")
except PermissionError: raise SystemExit(1)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
        return done.returncode == 0

    with listen(str(path)):
        for owner in (Owner(65501, 65502), Owner(65503), Owner(0, 65502), Owner(0, 0)):
            set_owner(str(path), owner)
            status = path.stat()
            assert (status.st_uid, status.st_gid) == (0, owner.gid or 0)
            assert stat.S_IMODE(status.st_mode) == 0o660
            assert connects(0, 0)
            for uid in (65501, 65503):
                assert connects(uid, 65504) is (uid == owner.uid)
            assert connects(65505, 65502) is (owner.gid == 65502)


@pytest.mark.root
def test_a_user_who_owns_the_socket_is_shut_out(tmp_path: Path) -> None:
    """The user to whom a unit gives the socket may not connect if vm.conf names another."""
    path = tmp_path / "socket"
    with listen(str(path)):
        os.chown(path, 65501, 0)
        present = present_owner(str(path))
        set_owner(str(path), Owner(65503))
        granted = os.getxattr(path, "system.posix_acl_access")
        assert granted[4:12] == struct.pack("<HHI", 1, 0, 0xFFFFFFFF)  # ACL_USER_OBJ: nothing
        set_owner(str(path), present)
        assert present_owner(str(path)) == present
        assert os.listxattr(path) == []


def test_a_socket_that_is_gone_has_no_owner(tmp_path: Path) -> None:
    """Both errors for a missing socket have its path and the reason."""
    path = str(tmp_path / "socket")
    with pytest.raises(ListenerError, match=f"^{path}: No such file or directory$"):
        present_owner(path)
    with pytest.raises(ListenerError, match=f"^{path}: No such file or directory$"):
        set_owner(path, Owner(os.geteuid()))
