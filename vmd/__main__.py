"""Entry point of `vmd` and `python -m vmd`."""

import sys


def main() -> None:
    """Say that this release has no daemon."""
    sys.exit("vmd: this release has no daemon yet: use 'vmctl run' for a VM in the foreground")


if __name__ == "__main__":
    main()
