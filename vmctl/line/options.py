"""Options of verbs: their description, and those that several verbs share.

`run` and `start` share one set of options: one that only the other takes is refused with the
reason.
"""

from collections.abc import Mapping

FILE = "<file>"
"""How a word is completed: the name of a file."""
VM = "<vm>"
"""The name of a VM."""


class Option:
    """An option of a verb: a plain class, as every command defines it, and makes all of them."""

    __slots__ = ("completes", "field", "help", "is_repeated", "name", "refused", "value")

    def __init__(  # noqa: PLR0917 - a row of a table
        self,
        name: str,
        field: str,
        help: str,  # noqa: A002 - as the attribute
        value: str = "",
        is_repeated: bool = False,
        completes: tuple[str, ...] = (),
        refused: str = "",
    ) -> None:
        self.name = name
        """As it is written: `-b` or `--json`."""
        self.field = field
        """The argument of the verb's function that has its value."""
        self.help = help
        self.value = value
        """How its value is called; without one it is a flag."""
        self.is_repeated = is_repeated
        """Whether it may come more than once: values are then a tuple, a flag is the number."""
        self.completes = completes
        """Words that its value can be, FILE or VM."""
        self.refused = refused
        """The reason why this verb does not take it, though a similar one does."""

    def but(self, refused: str) -> "Option":
        """Return it as one that is refused for a reason, if there is one."""
        return Option(
            self.name,
            self.field,
            self.help,
            self.value,
            self.is_repeated,
            self.completes,
            refused,
        )


JSON = Option("--json", "as_json", "Print JSON.")
CLONES = Option("-n", "count", "How many; each has another number for %d.", "count", True)
CLONES_READY = Option(
    "--wait",
    "until",
    "Wait until each clone's agent has renewed entropy, clock and identity; else it is killed.",
    "ready",
    True,
    ("ready",),
)
CLONES_TIMEOUT = Option("--timeout", "timeout", "With --wait: wait no longer.", "seconds", True)
RUNNING = Option("-r", "running", "Only VMs that run.")
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

ENDED = Option("--json", "as_json", "Print what has become of the VM as JSON.")

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
    Option("--agent", "agent", "Install vmm-agent in the guest, by cloud-init."),
    Option("--append", "append", "Kernel command line.", "string", True),
    Option("--balloon", "balloon", "Add a memory balloon: what the guest frees, the host gets."),
    Option(
        "--clock",
        "clock",
        "What the clock of a VM shows that goes on from a snapshot.",
        "frozen|now",
        True,
        ("frozen", "now"),
    ),
    Option(
        "--cloud-init",
        "cloud_init",
        "Let cloud-init in the guest set it up by this.",
        "user-data|directory",
        True,
        (FILE,),
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
    Option("--rw", "is_writable", "Let the command change this host's files."),
    Option("--save", "save", "Make a file of vm.conf.d of the VM, which then stays."),
    Option("--selftest", "selftest", "Boot the self-test guest that comes along."),
    Option(
        "--share",
        "shares",
        "Share a directory by virtio-fs, which the guest mounts by its tag; may be repeated.",
        "directory:tag[:ro|:rw]",
        True,
        (FILE,),
    ),
    Option(
        "--ssh-key",
        "ssh_keys",
        "Let the owner of this public key log in, by cloud-init; may be repeated.",
        *("file", True, (FILE,)),
    ),
    Option("--template", "is_template", "Once it is paused, it stays so: clones go on from it."),
    Option(
        "--timeout",
        "timeout",
        "Wait no longer; status 124. A VM of run is killed then.",
        "seconds",
        True,
    ),
    Option(
        "--tpm",
        "tpm",
        "Add a TPM, which keeps its secrets in this directory; needs swtpm.",
        "directory",
        True,
        (FILE,),
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
    Option("--watchdog", "watchdog", "Add a watchdog, which resets a guest that hangs."),
)
_NOT_FOR_RUN = {
    "-t": "there is no daemon that knows a template: give all options here",
    "--clock": "it goes on from the snapshot's",
    "--save": "there is no daemon whose configuration could have it",
    "--template": "there is no daemon that could clone it",
}
_NOT_FOR_START = {
    "--console-log": "vmd has the console: 'vmctl console' shows it, and the history too",
    "--gdb": "vmd makes no socket for it: 'vmctl gdb' debugs the VM",
    "--no-reboot": "vmd boots a VM again that reboots, but for one with -B",
    "--nvram": "vmd keeps the variables of each VM's firmware itself",
    "--rw": "it is for a command of run, behind --",
    "--virtio-console": "VMs of vmd have a serial port alone",
}


_OF_START = {
    "--tpm": Option("--tpm", "tpm", "Add a TPM, whose secrets vmd keeps; needs swtpm."),
}
"""Options that `start` has otherwise than `run`."""


def _options(
    refused: Mapping[str, str], others: Mapping[str, Option] | None = None
) -> tuple[Option, ...]:
    """Return the options of a VM for one of the verbs that make one."""
    return tuple(
        (others or {}).get(one.name, one).but(refused.get(one.name, "")) for one in _MACHINE_OPTIONS
    )


RUN_USAGE = (
    "[-cL] [-B device] [-b path] [-d disk] [-i count | interface]\n"
    "\t\t[-m size] [-n bridge] [-p count] [-r path] [--agent] [--append string]\n"
    "\t\t[--balloon] [--cloud-init path] [--console-log file] [--firmware name]\n"
    "\t\t[--forward forward] [--from path] [--gdb path[,wait]] [--initrd path]\n"
    "\t\t[--json] [--no-reboot] [--nvram path] [--selftest]\n"
    "\t\t[--share directory:tag[:ro|:rw]] [--ssh-key file] [--timeout seconds]\n"
    "\t\t[--tpm directory] [--virtio-console] [--vsock path] [--wait condition]\n"
    "\t\t[--watchdog] [name]\n"
    "\trun [options] [--rw] [name] -- command [arg ...]"
)
START_USAGE = (
    "[-cL] [-B device] [-b path] [-d disk] [-i count]\n"
    "\t\t[-m size] [-n switch] [-p count] [-r path] [-t name]\n"
    "\t\t[--agent] [--append string] [--balloon] [--clock policy]\n"
    "\t\t[--cloud-init path] [--firmware name] [--forward forward]\n"
    "\t\t[--from snapshot] [--initrd path] [--json] [--save] [--selftest]\n"
    "\t\t[--share directory:tag[:ro|:rw]] [--ssh-key file] [--template]\n"
    "\t\t[--timeout seconds] [--tpm] [--vsock auto] [--wait condition]\n"
    "\t\t[--watchdog] id | name"
)


RUN_OPTIONS = _options(_NOT_FOR_RUN)
START_OPTIONS = _options(_NOT_FOR_START, _OF_START)
