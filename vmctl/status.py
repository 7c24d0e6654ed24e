"""`vmctl status` and `vmctl show`: the table of VMs, and the network interfaces of one.

On a pipe OpenBSD's columns, to the letter; on a terminal a table; JSON with `--json`.

Source: section 3.3 of OpenBSD's behaviour.
"""

import json
import sys
from collections.abc import Sequence

from vmctl.client import Client, CommandError, Fields, parse_target
from vmctl.messages import fail
from vmd.config.sizes import fmt_scaled
from vmm_kvm.text import printable

HEADER = ("ID", "PID", "VCPUS", "MAXMEM", "CURMEM", "TTY", "OWNER", "STATE", "NAME")
_FORMAT = "%5s %5s %5s %7s %7s %7s %12s %8s %s"
_OWNER_MAX = 15


def show(words: Sequence[str] = (), *, running: bool = False, as_json: bool = False) -> int:
    """List VMs as `status` does, and the interfaces of the one that `words` names."""
    return _list(words, running=running, as_json=as_json, interfaces=bool(words))


def status(words: Sequence[str] = (), *, running: bool = False, as_json: bool = False) -> int:
    """List all VMs, or the one that `words` names; returns the exit status.

    That is 1 where there is no VM at all, or none that runs with `running`.
    """
    return _list(words, running=running, as_json=as_json, interfaces=False)


def _list(words: Sequence[str], *, running: bool, as_json: bool, interfaces: bool) -> int:
    try:
        target = parse_target(words[0]) if words else None
        with Client() as client:
            vms = client.vms(**{"interfaces": True} if interfaces else {})
    except CommandError as err:
        return fail(err)
    known = [vm for vm in vms if vm["pid"] is not None or not running]
    everything = target is None or target == (0, "")
    shown = [vm for vm in known if everything or (target and target.is_named_by(vm))]
    if as_json:
        print(json.dumps(shown, indent=2))
    elif sys.stdout.isatty():
        from vmctl.table import show_table  # noqa: PLC0415 - only people see it

        show_table(HEADER, [columns(vm) for vm in shown])
    else:
        print(_FORMAT % HEADER)
        for vm in shown:
            print(printable(_FORMAT % columns(vm)))
    if interfaces and not as_json:
        for vm in shown:
            for index, interface in enumerate(vm["interfaces"]):
                print("\n".join(interface_lines(index, interface)))
    return 0 if known else 1


def columns(vm: Fields) -> tuple[str, ...]:
    """Return a VM's row."""
    used = vm["memory_used"]
    return (
        str(vm["id"]),
        "-" if vm["pid"] is None else str(vm["pid"]),
        str(vm["cpus"]),
        fmt_scaled(vm["memory"]),
        "-" if used is None else fmt_scaled(used),
        vm["tty"].removeprefix("/dev/") or "-",
        owner(vm),
        vm["state"],
        vm["name"],
    )


def interface_lines(index: int, interface: Fields) -> list[str]:
    """Return what is printed of a network interface of a VM."""
    words = [f"interface {index}:", interface["tap"] or "-", f"lladdr {interface['lladdr']}"]
    if interface["is_locked"]:
        words.append("locked")
    if interface["is_local"]:
        words.append("local")
    told = {name: interface[name] for name in ("switch", "group", "rdomain")}
    words += [f"{name} {value}" for name, value in told.items() if value not in {None, ""}]
    if interface["queues"] > 1:
        words.append(f"queues {interface['queues']}")
    words += [f"mtu {interface['mtu']}", "up" if interface["is_up"] else "down"]
    lines = [" ".join(words)]
    for host, guest in zip(interface["host_addresses"], interface["guest_addresses"], strict=False):
        lines.append(f"\thost {host} guest {guest}")
    for forward in interface["forwards"]:
        protocol, port, to_port = forward["protocol"], forward["port"], forward["to_port"]
        lines.append(f"\tforward {protocol} {port} to {to_port}")
    if interface["tap"]:
        lines.append(
            f"\treceived {interface['received']} bytes, {interface['received_packets']} packets,"
            f" {interface['dropped']} dropped"
        )
        lines.append(f"\tsent {interface['sent']} bytes, {interface['sent_packets']} packets")
    return ["\t" * line.startswith("\t") + printable(line.lstrip("\t")) for line in lines]


def owner(vm: Fields) -> str:
    """Return who a VM belongs to: `user` or `user:group`, numbers where there are no names."""
    uid, gid = vm["uid"], vm["gid"]
    return (_user(uid) if gid is None else f"{_user(uid)}:{_group(gid)}")[:_OWNER_MAX]


def _user(uid: int) -> str:
    if uid == 0:
        return "root"
    import pwd  # noqa: PLC0415 - most VMs are root's

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def _group(gid: int) -> str:
    import grp  # noqa: PLC0415 - most VMs have none

    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return str(gid)
