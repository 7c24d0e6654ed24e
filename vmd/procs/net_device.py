"""`vmm-net`: serve a tap as a network interface by vhost-user, to any VMM that speaks it.

Options are those that QEMU's conventions for such programs want, and ours.
Source: QEMU docs/interop/vhost-user, "Backend program conventions".
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vmm_kvm.errors import VmmError
from vmm_kvm.net.ethernet import ADDRESS_SIZE, is_group
from vmm_kvm.net.nic import MTU_DEFAULT, MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX
from vmm_kvm.net.tap import Tap, open_tap
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.vhost_user.process import serve
from vmm_kvm.virtio.vhost_user.server import inherited, listen

_CAPABILITIES = {"type": "net"}
_PREFIX = b"\xfe\xe1\xbb"
_RANDOM_SIZE = ADDRESS_SIZE - len(_PREFIX)


def _address(text: str) -> bytes:
    address = bytes.fromhex(text.replace(":", ""))
    if len(address) != ADDRESS_SIZE or is_group(address) or not any(address):
        raise ValueError(text)
    return address


_address.__name__ = "address"  # argparse shows it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmm-net", description="Serve a tap by vhost-user.", allow_abbrev=False
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
    parser.add_argument(
        "--lladdr", type=_address, metavar="address", help="the guest's address; random by default"
    )
    parser.add_argument(
        "--locked", action="store_true", help="drop frames from another address, and to one"
    )
    parser.add_argument(
        "--mtu",
        type=int,
        default=MTU_DEFAULT,
        metavar="bytes",
        help=f"the largest packet, {MTU_MIN} to {MTU_MAX}; 1500 by default",
    )
    parser.add_argument(
        "--queues",
        type=int,
        default=1,
        metavar="count",
        help=f"queue pairs, 1 (default) to {QUEUE_PAIRS_MAX}",
    )
    parser.add_argument("--one-shot", action="store_true", help="end with the first connection")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, in detail")
    parser.add_argument("tap", nargs="?", help="the tap")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal or the last connection's end; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.print_capabilities:
        print(json.dumps(_CAPABILITIES))  # noqa: T201 - what it is asked for
        return 0
    if given.tap is None:
        parser.error("the following arguments are required: tap")
    if not 1 <= given.queues <= QUEUE_PAIRS_MAX:
        parser.error(f"argument --queues: {given.queues} is not 1 to {QUEUE_PAIRS_MAX}")
    if not MTU_MIN <= given.mtu <= MTU_MAX:
        parser.error(f"argument --mtu: {given.mtu} is not {MTU_MIN} to {MTU_MAX}")
    logging.basicConfig(
        format="vmm-net: %(message)s", level=logging.DEBUG if given.verbose else logging.WARNING
    )
    try:
        interface = VirtioNet(
            Tap(open_tap(given.tap, given.queues), given.tap),
            given.lladdr or _PREFIX + os.urandom(_RANDOM_SIZE),
            name=given.tap,
            mtu=given.mtu,
            is_locked=given.locked,
        )
        sock = listen(given.socket) if given.socket is not None else inherited(given.fd)
    except VmmError as err:
        return _failed(str(err))
    except OSError as err:
        return _failed(f"{given.socket or given.tap}: {err.strerror}")
    try:
        serve(sock, interface, is_one_shot=given.one_shot, signals=(signal.SIGTERM, signal.SIGINT))
    finally:
        if given.socket is not None:
            with suppress(FileNotFoundError):  # somebody tidied up
                Path(given.socket).unlink()
    return 0


def _failed(message: str) -> int:
    print(f"vmm-net: {message}", file=sys.stderr)  # noqa: T201 - a command
    return 1


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
