"""The two ways to read the command line of `vmctl run` agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmctl import cli, run
from vmctl.run_options import RunOptions, read_plainly

_WORDS = st.sampled_from(
    (
        *("-b", "-m", "-p", "-d", "-r", "-B", "-c", "-h", "-x", "-", "--", "", "web", "256M"),
        *("--initrd", "--append", "--timeout", "--selftest", "--no-reboot", "--firmware"),
        *(
            "--nvram",
            "--virtio-console",
            "--help",
            "--append=a=b",
            "--initrd=",
            "--no-reboot=1",
            "-m256M",
            "-m=1",
        ),
        *("--init", "console=ttyS0 quiet", "disk.qcow2,ro", "ümlaut", "-1"),
    )
)


def _by_typer(arguments: list[str]) -> RunOptions | None:
    """Return what typer makes of it; None if it refuses or prints something instead."""
    seen: list[RunOptions] = []

    def remember(options: RunOptions) -> int:
        seen.append(options)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run", remember)
        cli.main(["run", *arguments])
    return seen[0] if seen else None


def test_defaults() -> None:
    """Nothing but the verb means the same to both."""
    assert read_plainly([]) == _by_typer([]) == RunOptions()


def test_every_option_is_read_plainly() -> None:
    """What users type is not left to typer, whichever option it has."""
    line = [
        *(
            "-b",
            "vmlinuz",
            "-m",
            "1G",
            "-p",
            "2",
            "-d",
            "a.qcow2",
            "-d",
            "b.img,ro",
            "-r",
            "cd.iso",
        ),
        *("-B", "cdrom", "--firmware", "uefi", "--nvram", "vars", "--initrd", "1", "--initrd=2"),
        *("--append", "console=ttyS0", "--timeout", "5", "--selftest", "--no-reboot", "-c"),
        *("--virtio-console", "-L", "-n", "bridge0", "-i", "2", "-i", "tap:tap0", "web"),
    ]
    options = read_plainly(line)
    assert options is not None
    assert options == _by_typer(line)
    defaults = RunOptions(verbose=options.verbose)
    unread = [
        name for name in RunOptions._fields if getattr(options, name) == defaults._asdict()[name]
    ]
    assert unread == ["verbose"]


@settings(max_examples=300, deadline=None)
@given(st.lists(_WORDS, max_size=6))
def test_what_is_read_plainly_is_what_typer_reads(arguments: list[str]) -> None:
    """Whatever the short way accepts, typer accepts with the same meaning."""
    options = read_plainly(arguments)
    if options is not None:
        assert options == _by_typer(arguments)
