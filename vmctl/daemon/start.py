"""`vmctl start`: from its options to a request, and from the answer to OpenBSD's texts.

This opens the user's files with the user's rights, and sends descriptors: kernel, initial RAM
disks, disks with all their bases, ISO image. The daemon checks each, and opens nothing by its name.

Source: section 3.6 of OpenBSD's behaviour.
"""

import os
import time
from collections.abc import Sequence

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    Target,
    check_name,
    parse_target,
)
from vmctl.daemon.starting import open_file, path_of, say_started, shown, why_not_started
from vmctl.messages import choice, fail
from vmctl.report import EXIT_TIMEOUT, Report
from vmctl.values import VmOptions, cpus_of, memory_of, number_of, once, seconds_of
from vmm_kvm.errors import SpecError
from vmm_kvm.limits import DISKS_MAX, INTERFACES_MAX, NAME_MAX
from vmm_kvm.record import Record

TYPE_CHECKING = False  # as in `vmm_kvm.record`
if TYPE_CHECKING:  # loaded if there is a disk
    from vmd.config.disks import DiskOption
    from vmd.config.seeds import SeedOption

_INT_MAX = (1 << 31) - 1
_BOOT_DEVICES = ("disk", "cdrom", "net")
_FIRMWARE = ("bios", "uefi")
_CLOCKS = ("frozen", "now")


class StartOptions(VmOptions):
    """The command line of `vmctl start`, as typed."""

    template: tuple[str, ...] = ()
    """-t"""
    tpm: bool = False
    is_template: bool = False
    """--template"""
    save: bool = False
    clock: tuple[str, ...] = ()


def start(words: Sequence[str], **given: bool | int | str | tuple[str, ...]) -> int:
    """Start a VM; returns the exit status, which is 124 after a time-out.

    Args:
        words: its id or name.
        given: fields of StartOptions.
    """
    report = Report(bool(given.pop("as_json", False)))
    options = StartOptions(**given)  # type: ignore[arg-type] # as the table of verbs has it
    fds: list[int] = []
    try:
        target = parse_target(words[0])
        if target.name:
            check_name(target.name)
        condition = _condition(options)
        origin = _origin(options)
        keeps_seed = options.save and not options.agent
        if not origin and not keeps_seed:
            options = _with_seed(options, target)
        asked = {} if origin else _request(options, fds)
        with Client() as client:
            if origin:
                answer = _start_from(client, target, origin, once(options.clock, "clock"))
            elif options.save:
                answer = _save(client, target, asked, options)
            else:
                answer = client.ask("start", "started", {**target.fields(), **asked}, fds)
            if condition:
                say_started(answer)
                return _wait(condition, client, answer, report)
    except RefusedError as err:
        why = why_not_started(err)
        fail(why)
        return report.end(1, err.detail or why)
    except (CommandError, SpecError) as err:
        fail(err)
        return report.end(1, str(err))
    finally:
        for fd in fds:
            os.close(fd)
    report.end(0, "started", answer["id"], answer["pid"], answer["tty"])
    if options.console:
        from vmctl.daemon.attach import console  # noqa: PLC0415 - only with -c

        return console([str(answer["id"])])
    say_started(answer)
    return 0


def _origin(options: StartOptions) -> str | None:
    """Return the snapshot to continue from, which describes the whole VM."""
    origin, clock = once(options.origin, "snapshot"), once(options.clock, "clock")
    if clock is not None and clock not in _CLOCKS:
        raise CommandError(f"unknown clock {clock}\n{choice(_CLOCKS)}")
    if clock is not None and not origin:
        raise CommandError("--clock is for --from")
    about = ("origin", "clock", "timeout", "until", "console")
    if origin and any(value for field, value in vars(options).items() if field not in about):
        raise CommandError("--from says all of the VM: use no options that say what it is")
    return origin


def _with_seed(options: StartOptions, target: Target) -> StartOptions:
    """Add the disk of --cloud-init, --ssh-key and --agent; an agent is reached by vsock."""
    if not (options.cloud_init or options.ssh_keys or options.agent):
        return options
    from vmctl.images.seed import seed_disk  # noqa: PLC0415 - few VMs have one

    if options.agent and not options.vsock:
        options = options.but(vsock=("auto",))
    disk = seed_disk(target.name or f"vm{target.id}", options)
    return options.but(disks=(*options.disks, disk))


def _start_from(client: Client, target: Target, origin: str, clock: str | None) -> Fields:
    from vmctl.daemon.snapshots import start_from  # noqa: PLC0415 - only with --from

    if not target.name:
        raise CommandError("--from needs a name, not an id")
    return start_from(client, target.name, origin, clock=clock or "")


def _save(client: Client, target: Target, asked: Fields, options: StartOptions) -> Fields:
    """Make a VM part of the configuration; returns the answer to its start."""
    from vmctl.daemon.save import save  # noqa: PLC0415 - only with --save

    if options.is_template:
        raise CommandError("--save and --template: use one")
    save(
        client,
        target.name,
        asked,
        _disks(options),
        [path_of(each, "initrd") for each in options.initrd],
        seed=_saved_seed(options, target.name),
    )
    try:
        return client.ask("start", "started", target.fields())
    except RefusedError as err:
        vms: list[Fields] = client.ask("status", "vms", target.fields())["vms"]
        if err.code != "EALREADY" or not vms or vms[0]["pid"] is None:
            raise
        return vms[0]  # it runs already: the daemon starts configured VMs


def _saved_seed(options: StartOptions, name: str) -> "SeedOption | None":
    """Return the seed that the daemon makes at each start; with an agent it is among the disks.

    Raises:
        SpecError: there can be no such seed.
    """
    if options.agent or not (options.cloud_init or options.ssh_keys):
        return None
    from vmctl.images.seed import seed_image, seed_option  # noqa: PLC0415 - few VMs have one

    seed_image(name, options)
    option = seed_option(options)
    return option._replace(
        cloud_init=option.cloud_init and os.path.abspath(option.cloud_init),
        ssh_keys=tuple(map(os.path.abspath, option.ssh_keys)),
    )


class _Condition(Record):
    """The condition of `--wait`."""

    text: str
    deadline: float | None
    """By the monotonic clock."""


def _condition(options: StartOptions) -> _Condition | None:
    until, timeout = once(options.until, "condition"), once(options.timeout, "time-out")
    seconds = None if timeout is None else seconds_of(timeout)
    if until is None:
        if timeout is not None:
            raise SpecError("--timeout is for --wait")
        return None
    if options.console:
        raise SpecError("-c and --wait: use one")
    from vmctl.daemon.wait import check_condition  # noqa: PLC0415 - only with --wait

    check_condition(until)
    deadline = None if seconds is None else time.monotonic() + seconds
    return _Condition(text=until, deadline=deadline)


def _wait(condition: _Condition, client: Client, answer: Fields, report: Report) -> int:
    """Wait for the started VM as `vmctl wait` does."""
    from vmctl.daemon.wait import ExpiredError, wait_for  # noqa: PLC0415 - only with --wait

    told = answer["id"], answer["pid"], answer["tty"]
    try:
        text = wait_for(client, Target(id=answer["id"]), condition.text, condition.deadline)
    except ExpiredError:
        fail("timed out")
        return report.end(EXIT_TIMEOUT, "timed out", *told)
    except CommandError as err:
        fail(err)
        return report.end(1, str(err), *told)
    return report.end(0, text, *told)


def _request(options: StartOptions, fds: list[int]) -> Fields:
    """Return the request's fields; descriptors that they name are added to `fds`."""
    fields: Fields = {}
    boot = once(options.boot, "boot image")
    if options.selftest:
        from vmm_kvm.boot.firmware import selftest_path  # noqa: PLC0415 - only with --selftest

        if boot is not None:
            raise CommandError("--selftest and -b name two boot images: use one")
        boot = selftest_path()
    if boot is not None and options.firmware:
        named = "--selftest" if options.selftest else "-b"
        raise CommandError(f"{named} and --firmware name two boot images: use one")
    device = once(options.boot_device, "boot device")
    memory = once(options.memory, "memory")
    cpus = once(options.cpus, "cpus")
    cdrom = once(options.cdrom, "iso image")
    count = once(options.interfaces, "interfaces")
    if options.is_template:
        fields["is_template"] = True
    if device is not None:
        if device not in _BOOT_DEVICES:
            raise CommandError(f"unknown boot device {device}\n{choice(_BOOT_DEVICES)}")
        fields["boot_device"] = device
    if memory is not None:
        fields["memory"] = memory_of(memory)
    if cpus is not None:
        fields["cpus"] = cpus_of(cpus)
    disks = _disks(options)
    if disks:
        from vmctl.daemon.start_disks import disk_fields  # noqa: PLC0415 - not every VM has a disk

        fields["disks"] = [disk_fields(disk) for disk in disks]
    if cdrom is not None:
        cdrom = path_of(cdrom, "iso image")
        fields["cdrom"] = shown(cdrom)
    interfaces = _interfaces(options, count)
    if interfaces:
        fields["interfaces"] = interfaces
    if options.template:
        fields["instance"] = options.template[-1]
        if len(fields["instance"]) > NAME_MAX:
            raise CommandError(f"instance vm name too long\ninvalid name: {fields['instance']}")
        check_name(fields["instance"])
    firmware = once(options.firmware, "firmware")
    if firmware is not None:
        fields["firmware"] = firmware if firmware in _FIRMWARE else _firmware(firmware)
    append = once(options.append, "append")
    if append is not None:
        fields["append"] = append
    vsock = once(options.vsock, "vsock")
    if vsock is not None:
        if vsock != "auto":
            raise CommandError(f"invalid vsock: {vsock}: vmd makes no socket, use --vsock auto")
        fields["has_vsock"] = True
    if options.balloon:
        fields["has_balloon"] = True
    if options.watchdog:
        fields["has_watchdog"] = True
    if options.shares:
        from vmctl.daemon.start_shares import open_shares  # noqa: PLC0415 - few VMs have any

        fields["shares"] = open_shares(options.shares, fds)
    if options.tpm:
        fields["has_tpm"] = True
    _check(fields, has_kernel=boot is not None)
    if boot is not None:
        boot = path_of(boot, "boot image")
        fields["kernel_path"] = shown(boot)
        fields["kernel"] = open_file(boot, "kernel", fds)
    if options.initrd:
        if boot is None:
            raise CommandError("--initrd is for a kernel: use -b")
        paths = [path_of(each, "initrd") for each in options.initrd]
        fields["initrd"] = [open_file(path, "initrd", fds) for path in paths]
    if disks:
        from vmctl.daemon.start_disks import open_disks  # noqa: PLC0415 - see above

        open_disks(disks, fields["disks"], fds)
    if cdrom is not None:
        fields["cdrom_image"] = open_file(cdrom, "iso image", fds)
    return fields


def _disks(options: StartOptions) -> "list[DiskOption]":
    if not options.disks:
        return []
    from vmctl.daemon.start_disks import read_disks  # noqa: PLC0415 - not every VM has a disk

    return read_disks(options.disks)


def _check(fields: Fields, *, has_kernel: bool) -> None:
    """Refuse, or warn of, missing options of a new VM; an instance takes them from its template."""
    disks, interfaces = fields.get("disks", ()), fields.get("interfaces", ())
    if len(disks) > DISKS_MAX:
        raise CommandError("too many disks")
    if len(interfaces) > INTERFACES_MAX:
        raise CommandError("too many network interfaces")
    says_something = fields.keys() - {
        *("boot_device", "append", "instance", "is_template"),
        *("has_vsock", "has_balloon", "has_watchdog", "has_tpm", "shares"),
    }
    if "instance" in fields or not says_something or has_kernel or "firmware" in fields:
        return
    if not disks:
        fail("starting without disks")
        if "cdrom" not in fields:
            raise CommandError("no kernel or disk/cdrom specified")
    if not interfaces:
        fail("starting without network interfaces")


def _interfaces(options: StartOptions, count: str | None) -> list[Fields]:
    # Parsers of command lines do not preserve the order of -L and -n: local ones come first.
    interfaces: list[Fields] = [{"is_local": True} for _ in range(options.local)]
    for switch in options.switches:
        if not switch:
            raise CommandError(f"invalid network: {switch}")
        if len(os.fsencode(switch)) > NAME_MAX:
            raise CommandError("interface name too long")
        # OpenBSD's vmctl accepts a dot for a local interface.
        interfaces.append({"is_local": True} if switch == "." else {"switch": switch})
    if options.forwards:
        local = next((one for one in interfaces if "is_local" in one), None)
        if local is None:
            local = {"is_local": True}
            interfaces.insert(0, local)
        local["forwards"] = _forwards(options.forwards)
    if count is not None:
        try:
            wanted = number_of(count, "count", _INT_MAX)
        except SpecError as err:
            raise CommandError(f"{err}\ninvalid interface count: {count}") from None
        if wanted > INTERFACES_MAX:
            raise CommandError("too many network interfaces")
        interfaces += [{}] * (wanted - len(interfaces))
    return interfaces


def _forwards(texts: Sequence[str]) -> list[Fields]:
    from vmd.config.forwards import (  # noqa: PLC0415 - only here
        ForwardError,
        check_ports,
        parse_forward,
    )

    try:
        forwards = [parse_forward(text) for text in texts]
        check_ports(forwards)
    except ForwardError as err:
        raise CommandError(str(err)) from None
    return [forward._asdict() for forward in forwards]


def _firmware(text: str) -> str:
    try:
        return os.path.realpath(text, strict=True)
    except OSError as err:
        if "/" in text:
            raise CommandError(f"invalid firmware path: {text}: {err.strerror}") from err
        known = choice((*_FIRMWARE, "the path of an image"))
        raise CommandError(f"unknown firmware {text}: {err.strerror} ({known})") from err
