"""Grammar rules of networks: switches, and the interfaces of a VM.

Source: sections 4.2, 4.4 and 4.5 of OpenBSD's behaviour.
"""

from vmd.config.forwards import ANY, LOOPBACK, ForwardError, check_ports, host_address
from vmd.config.grammar import Tokens
from vmd.config.model import FORWARDS_MAX, RDOMAIN_MAX, ForwardConfig, InterfaceConfig, SwitchConfig
from vmd.config.values import address_of, bridge_of, byte_length, group_of, lladdr_of, tap_of
from vmm_kvm.limits import MTU_MAX, MTU_MIN, NAME_MAX, PORT_MAX, QUEUE_PAIRS_MAX

_OPTIONS = ("switch", "group", "locked", "lladdr", "rdomain", "up", "down")
INTERFACE_OWN_OPTIONS = ("forward", "mtu", "queues")
"""Options of an interface that OpenBSD does not have."""
SWITCH_OWN_OPTIONS = ("create", "address")
"""Options of a switch that OpenBSD does not have."""
_PROTOCOLS = ("tcp", "udp")


class SwitchRule:
    """`switch = "switch" string block of swopt`."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._switch = SwitchConfig("", "")

    def parse(self) -> SwitchConfig:
        """Take a switch."""
        tokens = self._tokens
        tokens.expect("switch")
        name = tokens.string()
        if byte_length(name) > NAME_MAX:
            tokens.refuse(f"switch name too long: {name}")
        self._switch = SwitchConfig(name, interface="")
        tokens.block(self._option)
        switch = self._switch
        if switch.is_created and not switch.interface:
            switch = switch._replace(interface=tokens.checked(bridge_of, name))
        if not switch.interface:
            tokens.refuse(f'switch "{name}" is missing interface name')
        if switch.address is not None and not switch.is_created:
            tokens.refuse(f'switch "{name}": address without create')
        return switch

    def _option(self) -> None:
        """Take an option of a switch.

        swopt = "enable" | "disable" | "group" string | "interface" string | "locked" "lladdr"
              | "rdomain" NUMBER | "up" | "down" | "create" | "address" string
        """
        tokens, switch = self._tokens, self._switch
        if tokens.accept("enable"):
            switch = switch._replace(is_enabled=True)
        elif tokens.accept("disable"):
            switch = switch._replace(is_enabled=False)
        elif tokens.accept("group"):
            switch = switch._replace(group=tokens.checked(group_of, tokens.string()))
        elif tokens.accept("interface"):
            switch = switch._replace(interface=tokens.checked(bridge_of, tokens.string()))
        elif tokens.accept("locked"):
            tokens.expect("lladdr")
            switch = switch._replace(is_locked=True)
        elif tokens.accept("rdomain"):
            switch = switch._replace(rdomain=_rdomain(tokens))
        elif tokens.accept("up"):
            switch = switch._replace(is_up=True)
        elif tokens.accept("down"):
            switch = switch._replace(is_up=False)
        elif tokens.is_at_own("create"):
            tokens.take()
            switch = switch._replace(is_created=True)
        elif tokens.is_at_own("address"):
            tokens.take()
            switch = switch._replace(address=tokens.checked(address_of, tokens.string()))
        else:
            tokens.syntax_error()
        self._switch = switch


class InterfaceRule:
    """`[ "local" ] "interface" [ STRING ] [ ifblock | iflist ]`."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._interface = InterfaceConfig()
        self._name: str | None = None

    def parse(self) -> InterfaceConfig:
        """Take an interface; its name is yet to be checked by `named`."""
        tokens = self._tokens
        is_local = tokens.accept("local")
        tokens.expect("interface")
        if tokens.peek().is_string:
            self._name = tokens.take().text
        self._interface = InterfaceConfig(is_local=is_local)
        if tokens.is_at("{"):
            tokens.loose_block(self._option)
        else:
            self._list()
        return self._interface

    def named(self) -> InterfaceConfig:
        """Return the interface with its name, or complain of that."""
        if self._name is None:
            return self._interface
        return self._interface._replace(tap=self._tokens.checked(tap_of, self._name))

    def _list(self) -> None:
        """Take options without braces: `iflist = ifopt { ifopt [ "," ] }`, or none."""
        if not self._is_at_option():
            return
        self._option()
        while self._is_at_option():
            self._option()
            self._tokens.accept(",")

    def _is_at_option(self) -> bool:
        tokens = self._tokens
        return any(tokens.is_at(word) for word in _OPTIONS) or any(
            tokens.is_at_own(word) for word in INTERFACE_OWN_OPTIONS
        )

    def _option(self) -> None:
        """Take an option of an interface.

        ifopt = "switch" string | "group" string | [ "locked" ] "lladdr" [ STRING ]
              | "rdomain" NUMBER | "up" | "down"
              | "forward" ( "tcp" | "udp" ) [ STRING ] NUMBER "to" NUMBER | "mtu" NUMBER
              | "queues" NUMBER
        """
        tokens, interface = self._tokens, self._interface
        if tokens.accept("switch"):
            name = tokens.string()
            if byte_length(name) > NAME_MAX:
                tokens.refuse(f"switch name too long: {name}")
            interface = interface._replace(switch=name or None)
        elif tokens.accept("group"):
            interface = interface._replace(group=tokens.checked(group_of, tokens.string()))
        elif tokens.is_at("locked") or tokens.is_at("lladdr"):
            is_locked = tokens.accept("locked") or interface.is_locked
            tokens.expect("lladdr")
            address = tokens.take().text if tokens.peek().is_string else None
            lladdr = None if address is None else tokens.checked(lladdr_of, address)
            interface = interface._replace(is_locked=is_locked, lladdr=lladdr)
        elif tokens.accept("rdomain"):
            interface = interface._replace(rdomain=_rdomain(tokens))
        elif tokens.accept("up"):
            interface = interface._replace(is_up=True)
        elif tokens.accept("down"):
            interface = interface._replace(is_up=False)
        elif tokens.is_at_own("forward"):
            interface = self._forward(interface)
        elif tokens.is_at_own("mtu"):
            tokens.take()
            mtu = _number(tokens, "mtu", MTU_MIN, MTU_MAX)
            interface = interface._replace(mtu=mtu)
        elif tokens.is_at_own("queues"):
            tokens.take()
            queues = _number(tokens, "queues", 1, QUEUE_PAIRS_MAX)
            interface = interface._replace(queues=queues)
        else:
            tokens.syntax_error()
        self._interface = interface

    def _forward(self, interface: InterfaceConfig) -> InterfaceConfig:
        tokens = self._tokens
        tokens.take()
        protocol = next((word for word in _PROTOCOLS if tokens.is_at_own(word)), None)
        if protocol is None:
            tokens.syntax_error()
        tokens.take()
        address = LOOPBACK
        if tokens.accept(ANY):
            address = ""
        elif tokens.peek().is_string:
            try:
                address = host_address(tokens.take().text)
            except ForwardError as err:
                tokens.refuse(str(err))
        port = _number(tokens, "port", 1, PORT_MAX)
        if not tokens.is_at_own("to"):
            tokens.syntax_error()
        tokens.take()
        to_port = _number(tokens, "port", 1, PORT_MAX)
        if not interface.is_local:
            tokens.refuse("forward is for local interfaces")
        if len(interface.forwards) >= FORWARDS_MAX:
            tokens.refuse("too many forwards")
        forwards = (*interface.forwards, ForwardConfig(protocol, port, to_port, address))
        try:
            check_ports(forwards)
        except ForwardError as err:
            tokens.refuse(str(err))
        return interface._replace(forwards=forwards)


def _rdomain(tokens: Tokens) -> int:
    number = tokens.number()
    if not 0 <= number <= RDOMAIN_MAX:
        tokens.refuse(f"invalid rdomain: {number}")
    return number


def _number(tokens: Tokens, what: str, least: int, most: int) -> int:
    number = tokens.number()
    if not least <= number <= most:
        tokens.refuse(f"invalid {what}: {number}: not {least} to {most}")
    return number
