"""Entry point of `vmctl` and `python -m vmctl`."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    if sys.argv[1:2] == ["run"]:
        # The imports of each way to read a command line are its cost.
        from vmctl.run_options import read_plainly  # noqa: PLC0415

        options = read_plainly(sys.argv[2:])
        if options is not None:
            from vmctl.run import run  # noqa: PLC0415

            sys.exit(run(options))
    else:
        from vmctl.verbs import perform, read_verb  # noqa: PLC0415

        read = read_verb(sys.argv[1:])
        status = perform(*read) if read else None
        if status is not None:
            sys.exit(status)
    from vmctl.cli import main as run_command_line  # noqa: PLC0415

    sys.exit(run_command_line())


if __name__ == "__main__":
    main()
