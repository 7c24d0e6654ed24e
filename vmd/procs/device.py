"""`vmm-blk`: serve a disk image by vhost-user, to any VMM that speaks it.

Options are those that QEMU's conventions for such programs want, and ours.
Source: QEMU docs/interop/vhost-user, "Backend program conventions".
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vmm_kvm.block.image import Format, open_image
from vmm_kvm.errors import VmmError
from vmm_kvm.virtio.blk import QUEUES_MAX, VirtioBlk
from vmm_kvm.virtio.vhost_user.process import serve
from vmm_kvm.virtio.vhost_user.server import inherited, listen

_CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmm-blk", description="Serve a disk image by vhost-user.", allow_abbrev=False
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
    parser.add_argument("--read-only", action="store_true", help="refuse writes")
    parser.add_argument(
        "--format",
        type=Format,
        choices=list(Format),
        metavar="format",
        help="raw or qcow2, instead of what the file looks like",
    )
    parser.add_argument(
        "--queues",
        type=int,
        default=1,
        metavar="count",
        help=f"queues, 1 (default) to {QUEUES_MAX}",
    )
    parser.add_argument(
        "--serial", default="", metavar="text", help="identity that the guest reads, up to 20 bytes"
    )
    parser.add_argument("--one-shot", action="store_true", help="end with the first connection")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, in detail")
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--blk-file", metavar="image", help="the disk image, as an option")
    image.add_argument("image", nargs="?", help="the disk image")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal or the last connection's end; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.print_capabilities:
        print(json.dumps(_CAPABILITIES))  # noqa: T201 - what it is asked for
        return 0
    image: str | None = given.image or given.blk_file
    if image is None:
        parser.error("the following arguments are required: image")
    if not 1 <= given.queues <= QUEUES_MAX:
        parser.error(f"argument --queues: {given.queues} is not 1 to {QUEUES_MAX}")
    logging.basicConfig(
        format="vmm-blk: %(message)s", level=logging.DEBUG if given.verbose else logging.WARNING
    )
    try:
        disk = _disk(image, given)
    except VmmError as err:
        return _failed(str(err))
    try:
        sock = listen(given.socket) if given.socket is not None else inherited(given.fd)
    except (VmmError, OSError) as err:
        disk.close()
        return _failed(str(err) if isinstance(err, VmmError) else f"{given.socket}: {err.strerror}")
    try:
        serve(sock, disk, is_one_shot=given.one_shot, signals=(signal.SIGTERM, signal.SIGINT))
    finally:
        if given.socket is not None:
            with suppress(FileNotFoundError):  # somebody tidied up
                Path(given.socket).unlink()
    return 0


def _disk(image: str, given: argparse.Namespace) -> VirtioBlk:
    opened = open_image(image, given.format, given.read_only)
    return VirtioBlk(opened, name=image, serial=given.serial, queues=given.queues)


def _failed(message: str) -> int:
    print(f"vmm-blk: {message}", file=sys.stderr)  # noqa: T201 - a command
    return 1


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
