"""Rules for what is on a network: switches, and the interfaces of a VM.

Source: sections 4.2, 4.4 and 4.5 of OpenBSD's behaviour.
"""

from vmd.config.grammar import Tokens
from vmd.config.model import NAME_MAX, RDOMAIN_MAX, InterfaceConfig, SwitchConfig
from vmd.config.values import bridge_of, byte_length, group_of, lladdr_of, tap_of

_OPTIONS = ("switch", "group", "locked", "lladdr", "rdomain", "up", "down")


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
        self._switch = SwitchConfig(name, interface="")
        tokens.block(self._option)
        if not self._switch.interface:
            tokens.refuse(f'switch "{name}" is missing interface name')
        return self._switch

    def _option(self) -> None:
        """Take an option of a switch.

        swopt = "enable" | "disable" | "group" string | "interface" string | "locked" "lladdr"
              | "rdomain" NUMBER | "up" | "down"
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
        return any(self._tokens.is_at(word) for word in _OPTIONS)

    def _option(self) -> None:
        """Take an option of an interface.

        ifopt = "switch" string | "group" string | [ "locked" ] "lladdr" [ STRING ]
              | "rdomain" NUMBER | "up" | "down"
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
        else:
            tokens.syntax_error()
        self._interface = interface


def _rdomain(tokens: Tokens) -> int:
    number = tokens.number()
    if not 0 <= number <= RDOMAIN_MAX:
        tokens.refuse(f"invalid rdomain: {number}")
    return number
