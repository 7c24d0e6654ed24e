"""The command line: every verb and option, declared; what they do is in the module of the verb.

Verbs may be shortened to any unique prefix. Modules are imported in the body of a command, so that
no command pays for another's.
"""

import sys
from typing import Annotated

import typer
from typer._click import Command, Context  # what get_command is declared with
from typer.core import TyperGroup

from vmctl.run_options import RunOptions
from vmctl.verbs import VERBS, usage
from vmctl.vm_commands import add_vm_commands

_USAGE = "usage:\tvmctl [-v] command [arg ...]"


class PrefixGroup(TyperGroup):
    """A command group whose commands can be named by any unique prefix.

    Source: OpenBSD vmctl(8); section 3.1 of its behaviour.
    """

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """Find the command that `cmd_name` abbreviates, or leave with OpenBSD's text."""
        matches = [name for name in self.list_commands(ctx) if name.startswith(cmd_name)]
        if len(matches) == 1:
            return super().get_command(ctx, matches[0])
        problem = "ambiguous" if matches else "unknown"
        print(f"{problem} argument: {cmd_name}\n{_USAGE}", file=sys.stderr)
        raise typer.Exit(1)


app = typer.Typer(
    name="vmctl",
    cls=PrefixGroup,
    help="Control virtual machines.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False},
)


@app.callback(invoke_without_command=True)
def main_options(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("-v", help="Log what happens, in detail.")] = False,
) -> None:
    """Control virtual machines."""
    if ctx.invoked_subcommand is None:
        print(_USAGE, file=sys.stderr)
        raise typer.Exit(1)
    ctx.obj = verbose


@app.command("run")
def run_command(  # noqa: PLR0917 - typer passes them by name
    ctx: typer.Context,
    boot: Annotated[
        str | None,
        typer.Option("-b", metavar="path", help="Kernel or firmware image to boot."),
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Boot the self-test guest that comes along.")
    ] = False,
    memory: Annotated[
        str, typer.Option("-m", metavar="size", help="Memory, such as 256M or 4G.")
    ] = "512M",
    cpus: Annotated[
        str, typer.Option("-p", metavar="count", help="Number of vCPUs, 1 to 64.")
    ] = "1",
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "-d",
            metavar="[format:]disk[,option...]",
            help="Disk image; may be repeated. Options: ro, serial=text, queues=count.",
        ),
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option(
            "-i",
            metavar="count|kind[:name][,option...]",
            help="Network interface, or how many; may be repeated.",
        ),
    ] = None,
    switch: Annotated[
        list[str] | None,
        typer.Option("-n", metavar="bridge", help="Add an interface on a bridge of this host."),
    ] = None,
    local: Annotated[
        bool, typer.Option("-L", help="Add an interface with user-mode networking by passt.")
    ] = False,
    cdrom: Annotated[
        str | None, typer.Option("-r", metavar="path", help="ISO image in the CD-ROM drive.")
    ] = None,
    firmware: Annotated[
        str | None,
        typer.Option(
            "--firmware",
            metavar="bios|uefi|path",
            help="Boot firmware; bios is the default where there are disks or an ISO image.",
        ),
    ] = None,
    nvram: Annotated[
        str | None,
        typer.Option(
            "--nvram",
            metavar="path",
            help="File that keeps the variables of UEFI firmware; made if it is missing.",
        ),
    ] = None,
    virtio_console: Annotated[
        bool,
        typer.Option(
            "--virtio-console",
            help="Add a virtio console, hvc0, which takes the input once its driver is ready.",
        ),
    ] = False,
    boot_device: Annotated[
        str | None,
        typer.Option("-B", metavar="device", help="What firmware boots from: disk, cdrom or net."),
    ] = None,
    initrd: Annotated[
        list[str] | None,
        typer.Option(
            "--initrd",
            metavar="path",
            help="Initial RAM disk; for a Multiboot kernel a module, and may be repeated.",
        ),
    ] = None,
    append: Annotated[
        str | None, typer.Option("--append", metavar="string", help="Kernel command line.")
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", metavar="seconds", help="Kill the VM after this time; status 124."
        ),
    ] = None,
    no_reboot: Annotated[
        bool,
        typer.Option("--no-reboot", help="End when the guest reboots, instead of booting again."),
    ] = False,
    attach: Annotated[
        bool, typer.Option("-c", help="Attach the console; always so for run.", hidden=True)
    ] = False,
    name: Annotated[str, typer.Argument(metavar="[name]", show_default=False)] = "",
) -> None:
    """Run a VM in the foreground, its console on this terminal, without a daemon."""
    del attach
    from vmctl.run import run  # noqa: PLC0415 - no other verb needs the hypervisor

    raise typer.Exit(
        run(
            RunOptions(
                boot=boot,
                selftest=selftest,
                memory=memory,
                cpus=cpus,
                disks=tuple(disk or ()),
                interfaces=tuple(interface or ()),
                switches=tuple(switch or ()),
                local=local,
                cdrom=cdrom,
                boot_device=boot_device,
                firmware=firmware,
                nvram=nvram,
                virtio_console=virtio_console,
                initrd=tuple(initrd or ()),
                append=append,
                timeout=timeout,
                reboot=not no_reboot,
                name=name,
                verbose=bool(ctx.obj),
            )
        )
    )


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell whether this host can run VMs, how fast, and what is missing."""
    from vmctl.doctor import doctor  # noqa: PLC0415 - no other verb needs the checks

    raise typer.Exit(doctor(as_json=as_json))


@app.command("create")
def create_command(
    ctx: typer.Context,
    disk: Annotated[list[str] | None, typer.Argument(metavar="disk", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option("-b", metavar="base", help="Make an overlay on this qcow2 image.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("-i", metavar="disk", help="Copy this disk into the new image.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("-s", metavar="size", help="Size of the disk, such as 10G.")
    ] = None,
) -> None:
    """Create a disk image: empty, as an overlay, or as a copy of another disk."""
    from vmctl.create import create, create_usage  # noqa: PLC0415 - no other verb needs it

    if not disk or len(disk) > 1:
        raise typer.Exit(create_usage())
    raise typer.Exit(create(disk[0], size, base, source, verbose=bool(ctx.obj)))


image_app = typer.Typer(
    name="image",
    cls=PrefixGroup,
    help="Tell about disk images.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False},
)
app.add_typer(image_app)


@image_app.command("info")
def image_info_command(
    ctx: typer.Context,
    disk: Annotated[str, typer.Argument(metavar="disk", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a disk image is: format, sizes, bases, snapshots."""
    from vmctl.images import info  # noqa: PLC0415 - no other verb needs it

    raise typer.Exit(info(disk, as_json=as_json, verbose=bool(ctx.obj)))


@image_app.command("check")
def image_check_command(
    ctx: typer.Context,
    disk: Annotated[str, typer.Argument(metavar="disk", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell whether a disk image is sound; exit status 1 if it is not."""
    from vmctl.images import check_image  # noqa: PLC0415 - no other verb needs it

    raise typer.Exit(check_image(disk, as_json=as_json, verbose=bool(ctx.obj)))


add_vm_commands(app)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or what the command says, or 1 for misuse."""
    try:
        status = typer.main.get_command(app).main(
            arguments, prog_name="vmctl", standalone_mode=False
        )
    except typer.Abort:
        return 1
    except typer.TyperException as err:
        text = err.format_message()
        context: Context | None = getattr(err, "ctx", None)
        verb = context.command.name if context else None
        explanation = usage(verb) if verb in VERBS else _USAGE
        print(f"vmctl: {text[:1].lower()}{text[1:].rstrip('.')}\n{explanation}", file=sys.stderr)
        return 1
    return int(status or 0)
