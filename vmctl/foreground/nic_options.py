"""Network interfaces of `vmctl run`, as a user writes them.

    kind[:what][,option...]

Kinds:

    tap:NAME         a tap of the host that exists, or that this user may make
    bridge:NAME      a tap of its own on a bridge of the host; as a rule for root alone
    passt            user-mode networking by passt(1), without privileges
    stream:PATH      the socket of a program that speaks as passt does
    vhost-user:PATH  the socket of a vhost-user-net server
    none             no cable

Options:

    lladdr=ADDRESS   the guest's address; as a rule one that follows from the VM's name
    locked           drop frames from another address, and to one; without vhost-net
    mtu=BYTES        the largest packet, 68 to 65521
    queues=N         (tap, bridge, vhost-user) queue pairs, 1 to 16; the tap, or the server, has to
                     have been made for several
    user             (tap, bridge) move frames in this process, where vhost-net could
    process          (tap, bridge) move them in a process of their own
    forward=PROTOCOL:[ADDRESS:]PORT[:PORT]
                     (passt) let connections to a port of the host reach one of the guest's; see
                     vmd.config.forwards
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple, TypeVar

from vmctl.messages import choice
from vmd.config.forwards import ForwardError, check_ports, parse_forward
from vmd.config.model import ForwardConfig
from vmd.config.values import ValueRefusedError, bridge_of, interface_of, lladdr_of
from vmm_kvm.errors import SpecError
from vmm_kvm.limits import MTU_DEFAULT, MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX
from vmm_kvm.net.ethernet import parse_lladdr

NICS_MAX = 16
_Value = TypeVar("_Value")


class NicKind(StrEnum):
    """The part before the colon."""

    TAP = "tap"
    BRIDGE = "bridge"
    PASST = "passt"
    STREAM = "stream"
    VHOST_USER = "vhost-user"
    NONE = "none"


class NicOption(NamedTuple):
    """One interface, as it was asked for."""

    kind: NicKind
    what: str = ""
    """The name of a tap or bridge, or the path of a socket."""
    lladdr: bytes | None = None
    is_locked: bool = False
    mtu: int = MTU_DEFAULT
    queues: int = 1
    is_user: bool = False
    is_process: bool = False
    forwards: tuple[ForwardConfig, ...] = ()


_TAPS = frozenset({NicKind.TAP, NicKind.BRIDGE})
_NAMED = _TAPS | {NicKind.STREAM, NicKind.VHOST_USER}
_ALL = frozenset(NicKind)
_KINDS = {
    "lladdr": _ALL,
    "locked": _ALL - {NicKind.VHOST_USER},
    "mtu": _ALL,
    "queues": _TAPS | {NicKind.VHOST_USER},
    "user": _TAPS,
    "process": _TAPS,
    "forward": frozenset({NicKind.PASST}),
}
_WITH_VALUE = frozenset({"lladdr", "mtu", "queues", "forward"})


def read_nics(
    texts: Sequence[str],
    bridges: Sequence[str] = (),
    local: int = 0,
    forwards: Sequence[str] = (),
) -> list[NicOption]:
    """Return the interfaces that `-i`, each an interface or a count, `-n` and so many `-L` ask for.

    A bridge that is called `.` is a local interface. `forwards` lead to the first local interface,
    which is there for them alone if need be. A count adds interfaces without a cable to those that
    are described, up to so many.

    Raises:
        SpecError: one cannot be understood, or there are too many.
    """
    nics, least = [], 0
    for text in texts:
        if text.isdecimal():
            least = _number(text, 0, NICS_MAX, "count", "")
        else:
            nics.append(parse_nic(text))
    local += bridges.count(".")
    nics += [NicOption(NicKind.BRIDGE, _bridge(each)) for each in bridges if each != "."]
    nics += [NicOption(NicKind.PASST)] * local
    if forwards:
        nics = _with_forwards(nics, forwards)
    nics += [NicOption(NicKind.NONE)] * (least - len(nics))
    if len(nics) > NICS_MAX:
        raise SpecError(f"{len(nics)} interfaces: {NICS_MAX} are possible")
    return nics


def _with_forwards(nics: list[NicOption], texts: Sequence[str]) -> list[NicOption]:
    if all(nic.kind is not NicKind.PASST for nic in nics):
        nics.append(NicOption(NicKind.PASST))
    index = next(index for index, nic in enumerate(nics) if nic.kind is NicKind.PASST)
    forwards = (*nics[index].forwards, *map(_forward, texts))
    try:
        check_ports(forwards)
    except ForwardError as err:
        raise SpecError(str(err)) from None
    nics[index] = nics[index]._replace(forwards=forwards)
    return nics


def parse_nic(text: str) -> NicOption:
    """Read an interface.

    Raises:
        SpecError: the kind is unknown, an option does not fit, or a value is wrong.
    """
    head, *options = text.split(",")
    word, _, what = head.partition(":")
    if word not in set(NicKind):
        kinds = choice([kind.value for kind in NicKind])
        raise SpecError(f"invalid interface: {text}: unknown kind '{word}' ({kinds})")
    nic = NicOption(NicKind(word), what)
    if bool(what) != (nic.kind in _NAMED):
        problem = "has no name" if not what else "takes no name"
        raise SpecError(f"invalid interface: {text}: {word} {problem}")
    if nic.kind in _TAPS:
        _named(interface_of if nic.kind is NicKind.TAP else bridge_of, what, f"{text}: ")
    for option in options:
        name, equals, value = option.partition("=")
        if name not in _KINDS or bool(equals) != (name in _WITH_VALUE):
            known = choice([f"{one}=" if one in _WITH_VALUE else one for one in sorted(_KINDS)])
            raise SpecError(f"invalid interface: {text}: unknown option {option!r} ({known})")
        if nic.kind not in _KINDS[name]:
            raise SpecError(f"invalid interface: {text}: {name} is not for {nic.kind}")
        nic = _with_option(nic, name, value, text)
    try:
        check_ports(nic.forwards)
    except ForwardError as err:
        raise SpecError(f"invalid interface: {text}: {err}") from None
    if nic.is_user and nic.is_process:
        raise SpecError(f"invalid interface: {text}: user and process exclude each other")
    return nic


def _with_option(nic: NicOption, name: str, value: str, text: str) -> NicOption:
    match name:
        case "lladdr":
            lladdr = _named(lladdr_of, value, f"{text}: ")
            return nic._replace(lladdr=None if lladdr is None else parse_lladdr(lladdr))
        case "locked":
            return nic._replace(is_locked=True)
        case "mtu":
            return nic._replace(mtu=_number(value, MTU_MIN, MTU_MAX, "mtu", f"{text}: "))
        case "queues":
            queues = _number(value, 1, QUEUE_PAIRS_MAX, "queues", f"{text}: ")
            return nic._replace(queues=queues)
        case "user":
            return nic._replace(is_user=True)
        case "process":
            return nic._replace(is_process=True)
        case _:
            return nic._replace(
                forwards=(*nic.forwards, _forward(value, f"invalid interface: {text}: "))
            )


def _number(value: str, least: int, most: int, what: str, where: str) -> int:
    is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(most))
    if not is_number or not least <= int(value) <= most:
        raise SpecError(f"invalid interface: {where}invalid {what}: {value}: not {least} to {most}")
    return int(value)


def _named(check: Callable[[str], _Value], value: str, where: str) -> _Value:
    """Return the result of a check that vm.conf has too, or complain in its words."""
    try:
        return check(value)
    except ValueRefusedError as err:
        raise SpecError(f"invalid interface: {where}{err}") from None


def _bridge(name: str) -> str:
    try:
        return bridge_of(name)
    except ValueRefusedError as err:
        raise SpecError(str(err)) from None


def _forward(text: str, where: str = "") -> ForwardConfig:
    try:
        return parse_forward(text)
    except ForwardError as err:
        raise SpecError(f"{where}{err}") from None
