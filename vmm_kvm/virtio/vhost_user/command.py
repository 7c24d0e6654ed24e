"""Options and main loop that the vhost-user commands share.

The options are those of QEMU's conventions for such programs, and our own.
Source: QEMU docs/interop/vhost-user, "Backend program conventions".
"""

import argparse
import json
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmm_kvm.errors import VmmError
from vmm_kvm.log import show_lines
from vmm_kvm.text import printable
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.vhost_user.process import serve
from vmm_kvm.virtio.vhost_user.server import inherited, listen

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Command(NamedTuple):
    """One such command."""

    name: str
    description: str
    capabilities: dict[str, str | list[str]]
    """The output of `--print-capabilities`."""

    def parser(self) -> argparse.ArgumentParser:
        """Return a parser for the common options, to which the command's own can be added."""
        parser = argparse.ArgumentParser(
            prog=self.name, description=self.description, allow_abbrev=False
        )
        place = parser.add_mutually_exclusive_group(required=True)
        place.add_argument(
            "--socket",
            "--socket-path",
            metavar="path",
            help="listen at this path, for one after another",
        )
        place.add_argument(
            "--fd",
            type=int,
            metavar="number",
            help="use this descriptor, a listening or connected socket",
        )
        place.add_argument(
            "--print-capabilities", action="store_true", help="print what this program can, as JSON"
        )
        parser.add_argument("--one-shot", action="store_true", help="end with the first connection")
        parser.add_argument(
            "-v", "--verbose", action="store_true", help="log what happens, in detail"
        )
        return parser

    def print_capabilities(self) -> int:
        """Print the program's capabilities; returns the exit status."""
        print(json.dumps(self.capabilities))  # noqa: T201 - the requested output
        return 0

    def run(self, given: argparse.Namespace, what: str, make: Callable[[], Backend]) -> int:
        """Serve what `make` makes of `what`, until a signal or the last connection's end.

        Returns the exit status. An error is one line on stderr.
        """
        show_lines(self.name, "DEBUG" if given.verbose else "WARNING")
        try:
            backend = make()
        except (VmmError, OSError) as err:
            return self._fail(what, err)
        try:
            sock: socket.socket = (
                listen(given.socket) if given.socket is not None else inherited(given.fd)
            )
        except (VmmError, OSError) as err:
            backend.close()
            return self._fail(given.socket, err)
        try:
            serve(sock, backend, is_one_shot=given.one_shot, signals=_SIGNALS)
        finally:
            if given.socket is not None:
                with suppress(FileNotFoundError):  # it has been removed
                    Path(given.socket).unlink()
        return 0

    def _fail(self, what: str, err: VmmError | OSError) -> int:
        message = str(err) if isinstance(err, VmmError) else f"{what}: {err.strerror}"
        print(f"{self.name}: {printable(message)}", file=sys.stderr)  # noqa: T201 - a command
        return 1
