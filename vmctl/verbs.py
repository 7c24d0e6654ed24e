"""The table of verbs: how each is written, what it does, and which function does it.

Everything else that knows verbs is made from it or held against it by tests: the command line is
read by it (`cli`), help is printed from it (`help`, and on a terminal `declaration`, for typer),
completion is made of it (`scripts/completions.py`), and vmctl(8) has to name the same.

It is data and imports nothing: every command pays for it.

Source: section 3.1 of OpenBSD's behaviour, for the usage of OpenBSD's verbs.
"""

from collections.abc import Mapping
from typing import NamedTuple

GLOBAL_USAGE = "usage:\tvmctl [-v] command [arg ...]"

FILE = "<file>"
"""What completes a word: the name of a file."""
VM = "<vm>"
"""The name of a VM."""


_OPENBSD = """console create load log pause receive reload reset send show start status stop
unpause wait"""


class Option(NamedTuple):
    """An option of a verb."""

    name: str
    """As it is written: `-b` or `--json`."""
    field: str
    """The argument of the verb's function that has its value."""
    help: str
    value: str = ""
    """How its value is called; without one it is a flag."""
    is_repeated: bool = False
    """Whether it may come more than once: values are then a tuple, a flag is the number."""
    completes: tuple[str, ...] = ()
    """Words that its value can be, FILE or VM."""
    refused: str = ""
    """Why this verb does not take it, though another one of the same kind does."""


class Verb(NamedTuple):
    """A verb: how it is written, and what does it."""

    name: str
    """One word, or two."""
    words: str
    """Its operands, as its usage shows them."""
    help: str
    """What it does, in a sentence."""
    module: str
    """The module of vmctl that has its function."""
    function: str
    """It takes the words, and what the options say by their fields; returns the exit status, or
    None if the words make no sense."""
    options: tuple[Option, ...] = ()
    least: int = 1
    """How many words there are, at least and at most."""
    most: int = 1
    usage: str = ""
    """Options and operands as OpenBSD shows them, in its lines; else they follow from the above."""
    completes: tuple[str, ...] = ()
    """As of options."""

    @property
    def is_openbsd(self) -> bool:
        """Whether OpenBSD has it: then it goes before ours where a word can be either."""
        return self.name in _OPENBSD.split()

    @property
    def taken(self) -> tuple[Option, ...]:
        """The options that are not refused."""
        return tuple(option for option in self.options if not option.refused)


_JSON = Option("--json", "as_json", "Print JSON.")
_CLONES = Option("-n", "count", "How many; each has another number for %d.", "count", True)
_RUNNING = Option("-r", "running", "Only VMs that run.")
_BOOT_DEVICES = ("disk", "cdrom", "net")
_FIRMWARE = ("bios", "uefi", FILE)
_DISK = Option(
    "-d",
    "disks",
    "Disk image; may be repeated. Options: ro, serial=text, queues=count, error=, snapshot.",
    *("[format:]disk[,option...]", True, (FILE,)),
)
_SIZE = "Memory, such as 256M or 4G; 512M by default."
_CPUS = "Number of vCPUs, 1 to 64."
_CDROM = "ISO image in the CD-ROM drive."
_INITRD = Option(
    "--initrd",
    "initrd",
    "Initial RAM disk; for a Multiboot kernel a module, and may be repeated.",
    *("path", True, (FILE,)),
)

_ENDED = Option("--json", "as_json", "Print what has become of the VM as JSON.")

# All that have a value may come more than once, to be used or to be refused.
_MACHINE_OPTIONS = (
    Option("-B", "boot_device", "What the VM boots from.", "device", True, _BOOT_DEVICES),
    Option("-b", "boot", "Kernel or firmware image to boot.", "path", True, (FILE,)),
    Option("-c", "console", "Attach the console; run always does."),
    _DISK,
    Option(
        "-i",
        "interfaces",
        "Number of network interfaces; for run also one of them.",
        "count|kind[:name][,option...]",
        True,
        ("bridge:", "none", "passt", "stream:", "tap:", "vhost-user:"),
    ),
    Option("-L", "local", "Add a local network interface; for run by passt.", "", True),
    Option("-m", "memory", _SIZE, "size", True),
    Option(
        "-n",
        "switches",
        "Add a network interface on a switch; for run on a bridge of this host.",
        "switch",
        True,
    ),
    Option("-p", "cpus", _CPUS, "count", True),
    Option("-r", "cdrom", _CDROM, "path", True, (FILE,)),
    Option("-t", "template", "Make an instance of this VM.", "name", True, (VM,)),
    Option("--append", "append", "Kernel command line.", "string", True),
    Option(
        "--clock",
        "clock",
        "What the clock of a VM shows that goes on from a snapshot.",
        "frozen|now",
        True,
        ("frozen", "now"),
    ),
    Option(
        "--console-log",
        "console_log",
        "Write what the console shows to this file too.",
        "file",
        True,
        (FILE,),
    ),
    Option(
        "--firmware",
        "firmware",
        "Boot firmware; bios is the default where there are disks or an ISO image.",
        "bios|uefi|path",
        True,
        _FIRMWARE,
    ),
    Option(
        "--forward",
        "forwards",
        "Let a port of this host lead to one of the guest's, on its first local interface.",
        "tcp|udp:[address:]port[:port]",
        True,
        ("tcp:", "udp:"),
    ),
    Option(
        "--from",
        "origin",
        "Go on from this snapshot; one with a slash is a file, for run it always is.",
        "snapshot",
        True,
        (FILE,),
    ),
    Option(
        "--gdb",
        "gdb",
        "Let GDB debug the guest through this socket; with wait it begins when GDB lets it.",
        "path[,wait]",
        True,
        (FILE,),
    ),
    _INITRD,
    Option("--json", "as_json", "Print what has become of the VM as JSON."),
    Option("--no-reboot", "no_reboot", "End when the guest reboots, instead of booting again."),
    Option(
        "--nvram",
        "nvram",
        "File that keeps the variables of UEFI firmware; made if it is missing.",
        "path",
        True,
        (FILE,),
    ),
    Option("--save", "save", "Make a file of vm.conf.d of the VM, which then stays."),
    Option("--selftest", "selftest", "Boot the self-test guest that comes along."),
    Option("--template", "is_template", "Once it is paused, it stays so: clones go on from it."),
    Option(
        "--timeout",
        "timeout",
        "Wait no longer; status 124. A VM of run is killed then.",
        "seconds",
        True,
    ),
    Option(
        "--virtio-console",
        "virtio_console",
        "Add a virtio console, hvc0, which takes the input once its driver is ready.",
    ),
    Option(
        "--vsock",
        "vsock",
        "Add a vsock device; for run, a socket of this path leads to it.",
        "auto|path[,cid=number]",
        True,
        ("auto", FILE),
    ),
    Option(
        "--wait",
        "until",
        "Wait until this has come, such as a text on the console; run ends then.",
        "console=text",
        True,
        ("console=",),
    ),
)
_NOT_FOR_RUN = {
    "-t": "there is no daemon that knows a template: give all options here",
    "--clock": "it goes on from the snapshot's",
    "--save": "there is no daemon whose configuration could have it",
    "--template": "there is no daemon that could clone it",
}
_NOT_FOR_START = {
    "--console-log": "vmd has the console: 'vmctl console' shows it, and the history too",
    "--gdb": "a VM of vmd cannot be debugged: use run",
    "--no-reboot": "vmd boots a VM again that reboots, but for one with -B",
    "--nvram": "vmd keeps the variables of each VM's firmware itself",
    "--virtio-console": "VMs of vmd have a serial port alone",
}


def _options(refused: Mapping[str, str]) -> tuple[Option, ...]:
    """Return the options of a VM for one of the verbs that make one."""
    return tuple(one._replace(refused=refused.get(one.name, "")) for one in _MACHINE_OPTIONS)


_RUN_USAGE = (
    "[-cL] [-B device] [-b path] [-d disk] [-i count | interface]\n"
    "\t\t[-m size] [-n bridge] [-p count] [-r path] [--append string]\n"
    "\t\t[--console-log file] [--firmware name] [--forward forward]\n"
    "\t\t[--from path] [--gdb path[,wait]] [--initrd path] [--json] [--no-reboot]\n"
    "\t\t[--nvram path] [--selftest] [--timeout seconds] [--virtio-console]\n"
    "\t\t[--vsock path] [--wait condition] [name]"
)
_START_USAGE = (
    "[-cL] [-B device] [-b path] [-d disk] [-i count]\n"
    "\t\t[-m size] [-n switch] [-p count] [-r path] [-t name]\n"
    "\t\t[--append string] [--clock policy] [--firmware name]\n"
    "\t\t[--forward forward] [--from snapshot] [--initrd path] [--json]\n"
    "\t\t[--save] [--selftest] [--template] [--timeout seconds]\n"
    "\t\t[--vsock auto] [--wait condition] id | name"
)
_LIST_OPTIONS = (
    _RUNNING,
    Option("-a", "every", "Those that are gone too, with addresses and how each ended."),
    _JSON,
)

_TABLE = (
    Verb(
        "clone",
        "id name[%d]",
        "Make VMs that go on where another one stands.",
        "clone",
        "clone",
        (_CLONES, _JSON),
        *(2, 2),
        completes=(VM,),
    ),
    Verb("console", "id", "Attach to the console of a VM.", "attach", "console")._replace(
        completes=(VM,)
    ),
    Verb(
        "cp",
        "source target",
        "Copy a file or a directory into a guest, or out of it, by its agent.",
        "copying",
        "copy",
        (Option("-r", "recursive", "Copy a directory, with all that is in it."),),
        *(2, 2),
        completes=(FILE,),
    ),
    Verb(
        "create",
        "disk",
        "Create a disk image: empty, as an overlay, or as a copy of another disk.",
        "create",
        "create",
        (
            Option("-b", "base", "Make an overlay on this qcow2 image.", "base", False, (FILE,)),
            Option("-i", "source", "Copy this disk into the new image.", "disk", False, (FILE,)),
            Option("-s", "size", "Size of the disk, such as 10G.", "size"),
        ),
        usage="[-b base | -i disk] [-s size] disk",
        completes=(FILE,),
    ),
    Verb(
        "doctor",
        "",
        "Tell whether this host can run VMs, how fast, and what is missing.",
        "doctor",
        "doctor",
        (_JSON,),
        *(0, 0),
    ),
    Verb(
        "events",
        "",
        "Print what happens to VMs, as it happens.",
        "control",
        "events",
        (_JSON,),
        *(0, 0),
    ),
    Verb(
        "exec",
        "id -- command [arg ...]",
        "Run a command in a guest, by its agent.",
        "execute",
        "execute",
        (
            Option("-C", "directory", "Where it runs; the user's home by default.", "directory"),
            Option(
                "-e", "environment", "Add this variable; may be repeated.", "name[=value]", True
            ),
            Option("-i", "interactive", "Pass on standard input; else it reads /dev/null."),
            Option("-t", "terminal", "Give it a terminal."),
            Option("-u", "user", "Run it as this user of the guest; root by default.", "user"),
            Option("--timeout", "timeout", "End it after this time; status 124.", "seconds"),
        ),
        *(2, 1 << 16),
        usage=(
            "[-it] [-C directory] [-e name[=value]] [-u user]\n"
            "\t\t[--timeout seconds] id -- command [arg ...]"
        ),
        completes=(VM,),
    ),
    Verb(
        "help",
        "[command]",
        "Tell what commands there are, or how one is used.",
        "help",
        "show_help",
        (),
        *(0, 2),
    ),
    Verb(
        "image check",
        "disk",
        "Tell whether a disk image is sound; the exit status is 1 if it is not.",
        "images",
        "check_image",
        (_JSON,),
        completes=(FILE,),
    ),
    Verb(
        "image info",
        "disk",
        "Tell what a disk image is: format, sizes, bases, snapshots.",
        "images",
        "info",
        (_JSON,),
        completes=(FILE,),
    ),
    Verb(
        "image resize",
        "disk size",
        "Make a disk image larger, or smaller.",
        "images",
        "resize_image",
        (Option("--shrink", "shrink", "Allow that the end of the disk is lost."),),
        *(2, 2),
        completes=(FILE,),
    ),
    Verb(
        "list",
        "",
        "Print the names of the VMs that the configuration has.",
        "status",
        "list_names",
        (_RUNNING, _JSON),
        *(0, 0),
    ),
    Verb(
        "load",
        "filename",
        "Let the daemon read another configuration file in addition.",
        "control",
        "load",
        completes=(FILE,),
    ),
    Verb(
        "log",
        "brief | verbose | id",
        "Let the daemon log little or much, or print what it has logged of a VM.",
        "history",
        "log",
        (
            Option("-f", "follow", "Go on with what is logged from now on."),
            Option("--json", "as_json", "Print each line as JSON."),
        ),
        usage="[-f] [--json] brief | verbose | id",
        completes=("brief", "verbose", VM),
    ),
    Verb("pause", "id", "Let a VM stand still.", "control", "pause", completes=(VM,)),
    Verb(
        "receive",
        "name",
        "Receive a VM that was sent, from standard input.",
        "transfer",
        "receive",
        (Option("-p", "stays_paused", "Let it stand still."),),
    ),
    Verb(
        "reload",
        "",
        "Let the daemon read its configuration again; VMs that run stay as they are.",
        "control",
        "reload",
        (),
        *(0, 0),
    ),
    Verb(
        "reset",
        "[all | switches | vms]",
        "End all VMs, or forget switches, or both.",
        "control",
        "reset",
        (),
        *(0, 1),
        completes=("all", "switches", "vms"),
    ),
    Verb(
        "run",
        "[name]",
        "Run a VM in the foreground, its console on this terminal, without a daemon.",
        "run",
        "run",
        _options(_NOT_FOR_RUN),
        *(0, 1),
        usage=_RUN_USAGE,
    ),
    Verb(
        "send",
        "id",
        "Send a VM to standard output, for vmctl receive, and end it.",
        "transfer",
        "send",
        (Option("-l", "keeps_running", "Let it go on."),),
        completes=(VM,),
    ),
    Verb(
        "show",
        "[id]",
        "List VMs, as status does, or tell all of one: disks, interfaces, how it ended.",
        "status",
        "show",
        _LIST_OPTIONS,
        *(0, 1),
        completes=(VM,),
    ),
    Verb(
        "snapshot",
        "[id [snapshot]]",
        "Make a snapshot of a VM, which goes on; or list, describe or remove those there are.",
        "snapshots",
        "snapshot",
        (
            Option("-l", "listed", "List the snapshots in the daemon's store."),
            Option("-o", "output", "Write it into this new file.", "file", completes=(FILE,)),
            Option("-r", "removed", "Remove a snapshot of the store.", "snapshot"),
            Option("--check", "checked", "Tell whether a snapshot is sound.", "snapshot"),
            Option("--info", "described", "Tell what a snapshot is.", "snapshot"),
            _JSON,
            Option("--no-disks", "no_disks", "Leave out the disks that the VM writes."),
        ),
        *(0, 2),
        usage=(
            "[--no-disks] [-o file] id [snapshot]\n"
            "\tvmctl snapshot [--json] -l | --check snapshot | --info snapshot\n"
            "\tvmctl snapshot -r snapshot"
        ),
        completes=(VM,),
    ),
    Verb(
        "start",
        "id | name",
        "Start a VM that exists, or make one and start it.",
        "start",
        "start",
        _options(_NOT_FOR_START),
        usage=_START_USAGE,
        completes=(VM,),
    ),
    Verb("status", "[id]", "List VMs.", "status", "status", _LIST_OPTIONS, *(0, 1))._replace(
        completes=(VM,)
    ),
    Verb(
        "stop",
        "[id | -a]",
        "Stop a VM.",
        "stop",
        "stop",
        (
            Option("-a", "every", "Every VM that runs, starts or waits for its turn."),
            Option("-f", "force", "Without asking the guest."),
            Option("-w", "wait", "Wait until it has ended."),
            _ENDED,
        ),
        *(0, 1),
        usage="[-fw] [--json] [id | -a]",
        completes=(VM,),
    ),
    Verb(
        "top",
        "",
        "Show what VMs use, again and again.",
        "top",
        "top",
        (
            Option("-d", "delay", "Time between two looks; 1 by default.", "seconds"),
            Option("-n", "count", "How often to look.", "count"),
            _JSON,
        ),
        *(0, 0),
    ),
    Verb(
        "metrics",
        "",
        "Print what VMs use, as text for OpenMetrics.",
        "metrics",
        "metrics",
        least=0,
        most=0,
    ),
    Verb("unpause", "id", "Let a paused VM go on.", "control", "unpause", completes=(VM,)),
    Verb(
        "wait",
        "id",
        "Wait until a VM ends or reboots.",
        "wait",
        "wait",
        (
            Option(
                "--for",
                "until",
                "Wait for another condition than its end.",
                "running | stopped | console=text",
                completes=("running", "stopped", "console="),
            ),
            Option("--timeout", "timeout", "Wait no longer; status 124.", "seconds"),
            _ENDED,
        ),
        completes=(VM,),
    ),
)

VERBS = {verb.name: verb for verb in _TABLE}
"""Every verb by its name."""


def usage(verb: Verb) -> str:
    """Return what is printed when a verb is misused."""
    return f"usage:\tvmctl [-v] {verb.name} {verb.usage or _usage(verb)}".rstrip()


def _usage(verb: Verb) -> str:
    options = (
        f"[{option.name} {option.value}]" if option.value else f"[{option.name}]"
        for option in verb.taken
    )
    return " ".join((*options, verb.words))


def names(group: str = "") -> dict[str, bool]:
    """Return the words that a verb can begin with, and whether OpenBSD has them.

    With a `group`, such as `image`, the second words of its verbs.
    """
    found = {}
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        if group in {"", first}:
            found[second if group else first] = verb.is_openbsd
    return found


def matches(word: str, known: Mapping[str, bool]) -> list[str]:
    """Return what `word` can stand for among `known`, which is as `names` returns it.

    A whole name is itself. Else a word stands for what begins with it among OpenBSD's verbs, and
    only where there is none, among ours: a verb of ours changes no abbreviation of OpenBSD's.
    """
    if word in known:
        return [word]
    found = [name for name in known if name.startswith(word)]
    return [name for name in found if known[name]] or found
