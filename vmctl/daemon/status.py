"""`vmctl status` and `vmctl show`: the table of VMs, and the details of one.

On a pipe OpenBSD's columns, to the letter; on a terminal a table; JSON with `--json`.

Source: section 3.3 of OpenBSD's behaviour.
"""

import json
import sys
import time
from collections.abc import Sequence

from vmctl.client import Client, CommandError, Fields, Target, parse_target
from vmctl.messages import fail
from vmctl.moment import moment, span
from vmd.config.sizes import fmt_scaled
from vmm_kvm.text import printable

HEADER = ("ID", "PID", "VCPUS", "MAXMEM", "CURMEM", "TTY", "OWNER", "STATE", "NAME")
ALL_HEADER = (*HEADER, "ADDRESS", "ENDED", "REASON")
_GONE = "gone"
_FORMAT = "%5s %5s %5s %7s %7s %7s %12s %8s %s"
_OWNER_MAX = 15


def show(
    words: Sequence[str] = (), *, running: bool = False, every: bool = False, as_json: bool = False
) -> int:
    """List VMs as `status` does, with details of the one that `words` names, and how it ended."""
    if every or not words:
        return status(words, running=running, every=every, as_json=as_json)
    wanted = {"interfaces": True, "devices": True, "gone": True}
    try:
        known, shown = _vms(words, wanted, running=running)
    except CommandError as err:
        return fail(err)
    live = [vm for vm in shown if vm["state"] != _GONE]
    shown = live or shown[:1]
    if as_json:
        print(json.dumps(shown, indent=2))
        return 0 if known else 1
    _print_table(HEADER, [columns(vm) for vm in shown])
    for vm in shown:
        for line in vm_lines(vm):
            print(printable(line))
        for index, interface in enumerate(vm["interfaces"]):
            print("\n".join(interface_lines(index, interface)))
    return 0 if known else 1


def status(
    words: Sequence[str] = (), *, running: bool = False, every: bool = False, as_json: bool = False
) -> int:
    """List all VMs, or the one that `words` names; returns the exit status.

    That is 1 if there is no VM at all, or with `running` no running one. With `every` it lists
    forgotten VMs too, addresses of guests, and how each VM ended the last time.
    """
    wanted = {"interfaces": True, "gone": True} if every else {}
    try:
        known, shown = _vms(words, wanted, running=running)
    except CommandError as err:
        return fail(err)
    if as_json:
        print(json.dumps(shown, indent=2))
    elif every:
        _print_table(ALL_HEADER, [(*columns(vm), *_end_columns(vm)) for vm in shown])
    else:
        _print_table(HEADER, [columns(vm) for vm in shown])
    return 0 if known else 1


def list_names(_words: Sequence[str] = (), *, running: bool = False, as_json: bool = False) -> int:
    """Print the names of configured VMs, a line each; returns the exit status."""
    try:
        known, _ = _vms((), {}, running=running)
    except CommandError as err:
        return fail(err)
    names = [vm["name"] for vm in known if vm["is_from_config"]]
    if as_json:
        print(json.dumps(names, indent=2))
    else:
        for name in names:
            print(printable(name))
    return 0


def _vms(
    words: Sequence[str], wanted: dict[str, bool], *, running: bool
) -> tuple[list[Fields], list[Fields]]:
    """Return all VMs, and the requested ones among them.

    Raises:
        CommandError: `words` name none, or there is no answer.
    """
    target = parse_target(words[0]) if words else None
    with Client() as client:
        vms = client.vms(**wanted)
    known = [vm for vm in vms if vm["pid"] is not None or not running]
    everything = target is None or target == Target()
    return known, [vm for vm in known if everything or (target and target.is_named_by(vm))]


def _print_table(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from vmctl.screen.table import show_table  # noqa: PLC0415 - only people see it

        show_table(header, rows)
        return
    # Of our own columns, only the last one may have blanks.
    form = _FORMAT + " %s" * (len(header) - len(HEADER))
    print(form % tuple(header))
    for row in rows:
        print(printable(form % row))


def _end_columns(vm: Fields) -> tuple[str, str, str]:
    """Return a guest's address, when its VM ended the last time, and why."""
    found = (one["guest_addresses"] for one in vm["interfaces"])
    address = next((each[0].partition("/")[0] for each in found if each), "-")
    end = vm["last_end"]
    return (address, moment(end["at"]), _why(end)) if end else (address, "-", "-")


def _why(end: Fields) -> str:
    return f"{end['reason']}: {end['message']}" if end["message"] else str(end["reason"])


def vm_lines(vm: Fields) -> list[str]:
    """Return the details that `show` prints of a VM, without its row and its interfaces."""
    lines = []
    if vm["started_at"] is not None:
        lines.append(f"uptime: {span(time.time() - vm['started_at'])}")
    if vm["boot"]:
        lines.append(f"boot: {vm['boot']}")
    if vm["append"] is not None:
        lines.append(f"append: {vm['append']}")
    for index, disk in enumerate(vm["disks"]):
        words = [f"disk {index}: {disk['path']}", disk["format"]]
        words += ["ro"] if disk["is_read_only"] else []
        words += ["snapshot"] if disk["is_snapshot"] else []
        words += [f"serial {disk['serial']}"] if disk["serial"] else []
        lines.append(" ".join(filter(None, words)))
    if vm["cdrom"]:
        lines.append(f"cdrom: {vm['cdrom']}")
    for index, share in enumerate(vm["shares"]):
        access = "server" if share["is_server"] else "ro" if share["is_read_only"] else "rw"
        lines.append(f"share {index}: {share['path']} tag {share['tag']} {access}")
    if vm["clone_of"]:
        lines.append(f"clone of: {vm['clone_of']}")
    if vm["is_template"]:
        lines.append("template: once paused, it stays so for its clones")
    if vm["has_tpm"]:
        lines.append("tpm: its secrets are kept by the VM's name and owner")
    if vm["after"]:
        lines.append(f"after: {', '.join(vm['after'])}")
    end = vm["last_end"]
    if end:
        exit_status = "" if end["exit"] is None else f" (exit {end['exit']})"
        lines.append(f"last end: {moment(end['at'])} {_why(end)}{exit_status}")
    return lines


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
        shown_state(vm),
        vm["name"],
    )


def shown_state(vm: Fields) -> str:
    """Return a VM's state, and the reason if it changed by itself."""
    state, reason = vm["state"], vm["pause_reason"]
    return f"{state} ({reason})" if reason else str(state)


def interface_lines(index: int, interface: Fields) -> list[str]:
    """Return the printed details of a VM's network interface."""
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
    if interface["problem"]:
        lines.append(f"\tproblem: {interface['problem']}")
    hosts, guests = interface["host_addresses"], interface["guest_addresses"]
    lines += [f"\thost {host} guest {guest}" for host, guest in zip(hosts, guests, strict=False)]
    lines += [f"\tguest {guest}" for guest in guests[len(hosts) :]]
    for forward in interface["forwards"]:
        address = forward["address"] or "*"
        ports = f"{forward['port']} to {forward['to_port']}"
        lines.append(f"\tforward {forward['protocol']} {address} {ports}")
    if interface["tap"]:
        lines.append(
            f"\treceived {interface['received']} bytes, {interface['received_packets']} packets,"
            f" {interface['dropped']} dropped"
        )
        lines.append(f"\tsent {interface['sent']} bytes, {interface['sent_packets']} packets")
    return ["\t" * line.startswith("\t") + printable(line.lstrip("\t")) for line in lines]


def owner(vm: Fields) -> str:
    """Return a VM's owner: `user` or `user:group`, numbers if there are no names."""
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
