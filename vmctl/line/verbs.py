"""The table of verbs: each one's form, its purpose, and its function.

Everything else that knows verbs is made from it or held against it by tests: the command line is
read by it (`cli`), help is printed from it (`help`, and on a terminal `declaration`, for typer),
completion is made of it (`scripts/completions.py`), and vmctl(8) has to name the same.

It is data and imports nothing but options, which are data too: every command pays for both.

Source: section 3.1 of OpenBSD's behaviour, for the usage of OpenBSD's verbs.
"""

from collections.abc import Mapping

from vmctl.line.options import (
    CLONES,
    CLONES_READY,
    CLONES_TIMEOUT,
    ENDED,
    FILE,
    JSON,
    RUN_OPTIONS,
    RUN_USAGE,
    RUNNING,
    START_OPTIONS,
    START_USAGE,
    VM,
    Option,
)

GLOBAL_USAGE = "usage:\tvmctl [-v] [-H host] command [arg ...]"

_OPENBSD = """console create load log pause receive reload reset send show start status stop
unpause wait"""


class Verb:
    """A verb: how it is written, and what does it; a plain class, as `Option`."""

    __slots__ = (
        *("behind", "completes", "function", "help", "least", "module"),
        *("most", "name", "options", "usage", "words"),
    )

    def __init__(  # noqa: PLR0917 - a row of a table
        self,
        name: str,
        words: str,
        help: str,  # noqa: A002 - as the attribute
        module: str,
        function: str,
        options: tuple[Option, ...] = (),
        least: int = 1,
        most: int = 1,
        usage: str = "",
        completes: tuple[str, ...] = (),
        behind: str = "",
    ) -> None:
        self.name = name
        """One word, or two."""
        self.words = words
        """Its operands, as its usage shows them."""
        self.help = help
        """Its purpose, in a sentence."""
        self.module = module
        """The module of vmctl that has its function."""
        self.function = function
        """It takes the words, and what the options say by their fields; returns the exit status, or
        None if the words make no sense."""
        self.options = options
        self.least = least
        """How many words there are, at least and at most."""
        self.most = most
        self.usage = usage
        """Options and operands as OpenBSD shows them, in its lines; else they follow from the
        above."""
        self.completes = completes
        """As of options."""
        self.behind = behind
        """The field for words behind `--`, where they are no operands."""

    @property
    def is_openbsd(self) -> bool:
        """Whether OpenBSD has it: then it goes before ours where a word can be either."""
        return self.name in _OPENBSD.split()

    @property
    def taken(self) -> tuple[Option, ...]:
        """The options that are not refused."""
        return tuple(option for option in self.options if not option.refused)


_LIST_OPTIONS = (
    RUNNING,
    Option("-a", "every", "Those that are gone too, with addresses and how each ended."),
    JSON,
)

_TABLE = (
    Verb(
        "clone",
        "id name[%d]",
        "Make VMs that go on where another one stands.",
        "daemon.clone",
        "clone",
        (CLONES, JSON, CLONES_TIMEOUT, CLONES_READY),
        *(2, 2),
        completes=(VM,),
    ),
    Verb(
        "connect",
        "id port",
        "Be standard input and output of a guest's port, by vsock or by its agent.",
        "guest.connecting",
        "connect",
        (),
        *(2, 2),
        completes=(VM,),
    ),
    Verb(
        "console",
        "id",
        "Attach to the console of a VM.",
        "daemon.attach",
        "console",
        completes=(VM,),
    ),
    Verb(
        "cp",
        "source target",
        "Copy a file or a directory into a guest, or out of it, by its agent.",
        "guest.copying",
        "copy",
        (Option("-r", "recursive", "Copy a directory, with all that is in it."),),
        *(2, 2),
        completes=(FILE,),
    ),
    Verb(
        "create",
        "disk",
        "Create a disk image: empty, as an overlay, or as a copy of another disk.",
        "images.create",
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
        (JSON,),
        *(0, 0),
    ),
    Verb(
        "events",
        "",
        "Print what happens to VMs, as it happens.",
        "daemon.control",
        "events",
        (JSON,),
        *(0, 0),
    ),
    Verb(
        "exec",
        "id -- command [arg ...]",
        "Run a command in a guest, by its agent.",
        "guest.execute",
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
        "gdb",
        "id [argument ...]",
        "Debug a VM's guest with GDB, which takes the arguments.",
        "daemon.gdb",
        "gdb",
        (Option("--stdio", "stdio", "Be what gdb talks to, on standard input and output."),),
        *(1, 1 << 16),
        usage="[--stdio] id [-- argument ...]",
        completes=(VM,),
    ),
    Verb(
        "help",
        "[command]",
        "Tell what commands there are, or how one is used.",
        "line.help",
        "show_help",
        (),
        *(0, 2),
    ),
    Verb(
        "image check",
        "disk",
        "Tell whether a disk image is sound; the exit status is 1 if it is not.",
        "images.image",
        "check_image",
        (JSON,),
        completes=(FILE,),
    ),
    Verb(
        "image info",
        "disk",
        "Tell what a disk image is: format, sizes, bases, snapshots.",
        "images.image",
        "info",
        (JSON,),
        completes=(FILE,),
    ),
    Verb(
        "image list",
        "",
        "Print the images that were pulled.",
        "images.pull",
        "show_list",
        (JSON,),
        *(0, 0),
    ),
    Verb(
        "image prune",
        "",
        "Remove images without a name, what was pulled in part, and seeds that no VM needs.",
        "daemon.pruning",
        "prune",
        (),
        *(0, 0),
    ),
    Verb(
        "image pull",
        "image [name]",
        "Get an image, by a known name or an address, and check its digest.",
        "images.pull",
        "pull",
        (
            Option("--digest", "digest", "It has this digest.", "sha256:digits"),
            Option("--limit", "limit", "Take no more than this; 64G by default.", "size"),
            Option("--sums", "sums", "Its digest is in this list.", "address"),
            Option("--timeout", "timeout", "Give up after this time without data.", "seconds"),
        ),
        *(1, 2),
        usage=(
            "[--digest algorithm:digits | --sums address] [--limit size]\n"
            "\t\t[--timeout seconds] name | address [name]"
        ),
    ),
    Verb(
        "image resize",
        "disk size",
        "Make a disk image larger, or smaller.",
        "images.image",
        "resize_image",
        (Option("--shrink", "shrink", "Allow that the end of the disk is lost."),),
        *(2, 2),
        completes=(FILE,),
    ),
    Verb(
        "image rm",
        "name ...",
        "Remove images that were pulled.",
        "images.pull",
        "remove",
        (),
        *(1, 1 << 16),
    ),
    Verb(
        "list",
        "",
        "Print the names of the VMs that the configuration has.",
        "daemon.status",
        "list_names",
        (RUNNING, JSON),
        *(0, 0),
    ),
    Verb(
        "load",
        "filename",
        "Let the daemon read another configuration file in addition.",
        "daemon.control",
        "load",
        completes=(FILE,),
    ),
    Verb(
        "log",
        "brief | verbose | id",
        "Let the daemon log little or much, or print what it has logged of a VM.",
        "daemon.history",
        "log",
        (
            Option("-f", "follow", "Go on with what is logged from now on."),
            Option("--json", "as_json", "Print each line as JSON."),
        ),
        usage="[-f] [--json] brief | verbose | id",
        completes=("brief", "verbose", VM),
    ),
    Verb(
        "migrate",
        "id [user@]host",
        "Hand a VM over to another host, while it runs.",
        "daemon.migrate",
        "migrate",
        (
            Option("--downtime", "downtime", "How long it may stand still; 300.", "milliseconds"),
            Option("--timeout", "timeout", "How long to wait until that is enough.", "seconds"),
            Option(
                "--on-timeout",
                "on_timeout",
                "What then: cancel, or let it stand still for longer.",
                "cancel | force",
                completes=("cancel", "force"),
            ),
            Option("--ssh", "ssh", "The command to use for ssh, with its options.", "command"),
            Option("--copy-storage", "copies_storage", "Copy disks that the other host lacks."),
        ),
        *(2, 2),
        usage="[--copy-storage] [--downtime ms] [--timeout s] [--on-timeout cancel | force]\n"
        "\t\t[--ssh command] id [user@]host",
        completes=(VM,),
    ),
    Verb("pause", "id", "Pause a VM.", "daemon.control", "pause", completes=(VM,)),
    Verb(
        "receive",
        "name",
        "Receive a VM that was sent, from standard input.",
        "daemon.receive",
        "receive",
        (
            Option("-p", "stays_paused", "Let it stand still."),
            Option("--live", "is_handed_over", "Take part in a hand-over, by standard output."),
            Option("--copy-storage", "copies_storage", "Make the disks that are not here."),
        ),
    ),
    Verb(
        "reload",
        "",
        "Let the daemon read its configuration again; VMs that run stay as they are.",
        "daemon.control",
        "reload",
        (),
        *(0, 0),
    ),
    Verb(
        "reset",
        "[all | switches | vms]",
        "End all VMs, or forget switches, or both.",
        "daemon.control",
        "reset",
        (),
        *(0, 1),
        completes=("all", "switches", "vms"),
    ),
    Verb(
        "run",
        "[name]",
        "Run a VM in the foreground, its console on this terminal, without a daemon.",
        "foreground.run",
        "run",
        RUN_OPTIONS,
        *(0, 1),
        usage=RUN_USAGE,
        behind="command",
    ),
    Verb(
        "send",
        "id",
        "Send a VM to standard output, for vmctl receive, and end it.",
        "daemon.transfer",
        "send",
        (Option("-l", "keeps_running", "Let it go on."),),
        completes=(VM,),
    ),
    Verb(
        "show",
        "[id]",
        "List VMs, as status does, or tell all of one: disks, interfaces, how it ended.",
        "daemon.status",
        "show",
        _LIST_OPTIONS,
        *(0, 1),
        completes=(VM,),
    ),
    Verb(
        "snapshot",
        "[id [snapshot]]",
        "Make a snapshot of a VM, which goes on; or list, describe or remove those there are.",
        "daemon.snapshots",
        "snapshot",
        (
            Option("-l", "listed", "List the snapshots in the daemon's store."),
            Option("-o", "output", "Write it into this new file.", "file", completes=(FILE,)),
            Option("-r", "removed", "Remove a snapshot of the store.", "snapshot"),
            Option("--check", "checked", "Tell whether a snapshot is sound.", "snapshot"),
            Option("--info", "described", "Tell what a snapshot is.", "snapshot"),
            JSON,
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
        "ssh",
        "[user@]id [command [arg ...]]",
        "Log in to a guest by ssh, which needs no address.",
        "guest.connecting",
        "ssh",
        (
            Option("-i", "identity", "A file with a private key.", "file", True, (FILE,)),
            Option("-l", "user", "The user of the guest; root by default.", "user"),
            Option("-o", "options", "An option of ssh, as of ssh_config(5).", "option", True),
            Option("-p", "port", "The guest's port; 22 by default.", "port"),
            Option("--ssh", "command", "The command to use for ssh, with its options.", "command"),
        ),
        *(1, 1 << 16),
        usage=(
            "[-i file] [-l user] [-o option] [-p port] [--ssh command]\n"
            "\t\t[user@]id [-- command [arg ...]]"
        ),
        completes=(VM,),
    ),
    Verb(
        "ssh-config",
        "[id]",
        "Print lines for ssh_config(5), by which ssh reaches a VM, or each of them.",
        "guest.connecting",
        "show_config",
        (),
        *(0, 1),
        completes=(VM,),
    ),
    Verb(
        "start",
        "id | name",
        "Start a VM that exists, or make one and start it.",
        "daemon.start",
        "start",
        START_OPTIONS,
        usage=START_USAGE,
        completes=(VM,),
    ),
    Verb(
        "status",
        "[id]",
        "List VMs.",
        "daemon.status",
        "status",
        _LIST_OPTIONS,
        *(0, 1),
        completes=(VM,),
    ),
    Verb(
        "stop",
        "[id | -a]",
        "Stop a VM.",
        "daemon.stop",
        "stop",
        (
            Option("-a", "every", "Every VM that runs, starts or waits for its turn."),
            Option("-f", "force", "Without asking the guest."),
            Option("-w", "wait", "Wait until it has ended."),
            ENDED,
        ),
        *(0, 1),
        usage="[-fw] [--json] [id | -a]",
        completes=(VM,),
    ),
    Verb(
        "top",
        "",
        "Show what VMs use, again and again.",
        "daemon.top",
        "top",
        (
            Option("-d", "delay", "Time between two looks; 1 by default.", "seconds"),
            Option("-n", "count", "How often to look.", "count"),
            JSON,
        ),
        *(0, 0),
    ),
    Verb(
        "metrics",
        "",
        "Print what VMs use, as text for OpenMetrics.",
        "daemon.metrics",
        "metrics",
        least=0,
        most=0,
    ),
    Verb(
        "web",
        "",
        "Serve a page for this user's browser, on 127.0.0.1.",
        "web.command",
        "web",
        (Option("--port", "port", "Where; any port that is free by default.", "port"),),
        *(0, 0),
    ),
    Verb(
        "unpause",
        "id",
        "Let a paused VM continue.",
        "daemon.control",
        "unpause",
        (Option("-f", "force", "Though it may run on another host."),),
        completes=(VM,),
    ),
    Verb(
        "wait",
        "id",
        "Wait until a VM ends or reboots.",
        "daemon.wait",
        "wait",
        (
            Option(
                "--for",
                "until",
                "Wait for another condition than its end.",
                "running | stopped | ready | file=path | port=number | unit=name | console=text",
                completes=("running", "stopped", "ready", "file=", "port=", "unit=", "console="),
            ),
            Option("--timeout", "timeout", "Wait no longer; status 124.", "seconds"),
            ENDED,
        ),
        completes=(VM,),
    ),
)

VERBS = {verb.name: verb for verb in _TABLE}
"""Every verb by its name."""


def usage(verb: Verb) -> str:
    """Return the text for a misused verb."""
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
