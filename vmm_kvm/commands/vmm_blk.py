"""`vmm-blk`: serve a disk image by vhost-user, to any VMM that speaks it."""

import argparse
import sys
from collections.abc import Sequence

from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image
from vmm_kvm.limits import DISK_QUEUES_MAX
from vmm_kvm.standard_streams import run_program
from vmm_kvm.virtio.blk import VirtioBlk
from vmm_kvm.virtio.vhost_user.command import Command

_COMMAND = Command(
    "vmm-blk",
    "Serve a disk image by vhost-user.",
    {"type": "block", "features": ["read-only", "blk-file"]},
)


def _parser() -> argparse.ArgumentParser:
    parser = _COMMAND.parser()
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
        help=f"queues, 1 (default) to {DISK_QUEUES_MAX}",
    )
    parser.add_argument(
        "--serial", default="", metavar="text", help="identity that the guest reads, up to 20 bytes"
    )
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--blk-file", metavar="image", help="the disk image, as an option")
    image.add_argument("image", nargs="?", help="the disk image")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal or the last connection's end; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.print_capabilities:
        return _COMMAND.print_capabilities()
    image: str | None = given.image or given.blk_file
    if image is None:
        parser.error("the following arguments are required: image")
    if not 1 <= given.queues <= DISK_QUEUES_MAX:
        parser.error(f"argument --queues: {given.queues} is not 1 to {DISK_QUEUES_MAX}")
    return _COMMAND.run(given, image, lambda: _disk(image, given))


def _disk(image: str, given: argparse.Namespace) -> VirtioBlk:
    opened = open_image(image, given.format, given.read_only)
    return VirtioBlk(opened, name=image, serial=given.serial, queues=given.queues)


def main() -> None:
    """Run the command line and exit with its status."""
    run_program("vmm-blk", lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
