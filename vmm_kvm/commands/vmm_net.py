"""`vmm-net`: serve a tap as a network interface by vhost-user, to any VMM that speaks it."""

import argparse
import os
import sys
from collections.abc import Sequence

from vmm_kvm.limits import MTU_DEFAULT, MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX
from vmm_kvm.net.ethernet import ADDRESS_SIZE, parse_lladdr
from vmm_kvm.net.tap import Tap, open_tap
from vmm_kvm.standard_streams import run_program
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.vhost_user.command import Command

_COMMAND = Command("vmm-net", "Serve a tap by vhost-user.", {"type": "net"})
_PREFIX = b"\xfe\xe1\xbb"
_RANDOM_SIZE = ADDRESS_SIZE - len(_PREFIX)


def _address(text: str) -> bytes:
    try:
        return parse_lladdr(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from None


def _parser() -> argparse.ArgumentParser:
    parser = _COMMAND.parser()
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
        help=f"the largest packet, {MTU_MIN} to {MTU_MAX}; {MTU_DEFAULT} by default",
    )
    parser.add_argument(
        "--queues",
        type=int,
        default=1,
        metavar="count",
        help=f"queue pairs, 1 (default) to {QUEUE_PAIRS_MAX}",
    )
    parser.add_argument("tap", nargs="?", help="the tap")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal or the last connection's end; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.print_capabilities:
        return _COMMAND.print_capabilities()
    if given.tap is None:
        parser.error("the following arguments are required: tap")
    if not 1 <= given.queues <= QUEUE_PAIRS_MAX:
        parser.error(f"argument --queues: {given.queues} is not 1 to {QUEUE_PAIRS_MAX}")
    if not MTU_MIN <= given.mtu <= MTU_MAX:
        parser.error(f"argument --mtu: {given.mtu} is not {MTU_MIN} to {MTU_MAX}")
    return _COMMAND.run(given, given.tap, lambda: _interface(given))


def _interface(given: argparse.Namespace) -> VirtioNet:
    return VirtioNet(
        Tap(open_tap(given.tap, given.queues), given.tap),
        given.lladdr or _PREFIX + os.urandom(_RANDOM_SIZE),
        name=given.tap,
        mtu=given.mtu,
        is_locked=given.locked,
    )


def main() -> None:
    """Run the command line and exit with its status."""
    run_program("vmm-net", lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
