"""Entry point of `vmctl` and `python -m vmctl`."""

import gc
import sys
from collections.abc import Sequence

from vmm_kvm.standard_streams import run_program


def main() -> None:
    """Run the command line and exit with its status."""
    run_program("vmctl", lambda: _perform(sys.argv[1:]))


def _perform(arguments: Sequence[str]) -> int:
    """Read the arguments by the cheapest way that can, and do what they say."""
    # The imports of each way to read a command line are its cost.
    if arguments[:1] == ["run"]:
        from vmctl.run_options import read_plainly  # noqa: PLC0415

        options = read_plainly(arguments[1:])
        if options is not None:
            gc.disable()  # modules stay: a search among them for garbage finds none
            from vmctl.run import run  # noqa: PLC0415

            gc.freeze()
            gc.enable()
            return run(options)
    else:
        from vmctl.verbs import perform, read_verb  # noqa: PLC0415

        read = read_verb(arguments)
        status = perform(*read) if read else None
        if status is not None:
            return status
    from vmctl.cli import main as run_command_line  # noqa: PLC0415

    return run_command_line()


if __name__ == "__main__":
    main()
