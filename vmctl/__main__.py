"""Entry point of `vmctl` and `python -m vmctl`."""

import sys

from vmctl.cli import main as run_command_line


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run_command_line())


if __name__ == "__main__":
    main()
