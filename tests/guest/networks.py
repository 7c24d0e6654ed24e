"""A network for a guest: a network namespace of its own, with a tap."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def host(number: int = 0) -> str:
    """Return the host's address in the network of a tap."""
    return f"10.99.{number}.1"


def guest(number: int = 0) -> str:
    """Return the guest's address."""
    return f"10.99.{number}.2"


def host6(number: int = 0) -> str:
    """Return the host's IPv6 address."""
    return f"fd99:{number}::1"


def guest6(number: int = 0) -> str:
    """Return the guest's IPv6 address."""
    return f"fd99:{number}::2"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace, by its name."""

    name: str

    def command(self, *arguments: str) -> list[str]:
        """Return the words that run a command in it."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def run(self, *arguments: str) -> str:
        """Run a command in it, which must succeed; returns its output."""
        done = subprocess.run(self.command(*arguments), check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def ip(self, *arguments: str) -> str:
        """Run the command `ip` for it, which must succeed; returns its output."""
        return subprocess.run(
            ["ip", "-n", self.name, *arguments], check=True, capture_output=True, text=True
        ).stdout


@contextmanager
def namespace(suffix: str = "") -> Iterator[Namespace]:
    """Make a namespace with a loopback interface, and remove it."""
    made = Namespace(f"vmm-test-{os.getpid()}{suffix}")
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        made.ip("link", "set", "lo", "up")
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", made.name], check=True)


@contextmanager
def network(count: int = 1, *, queues: int = 1, mtu: int = 1500) -> Iterator[Namespace]:
    """Make a namespace with taps, each with the host's addresses in a network of its own."""
    with namespace() as made:
        several = ["multi_queue"] if queues > 1 else []
        for number in range(count):
            tap = f"tap{number}"
            made.ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr", *several)
            made.ip("link", "set", tap, "mtu", str(mtu), "up")
            made.ip("addr", "add", f"{host(number)}/24", "dev", tap)
            made.ip("addr", "add", f"{host6(number)}/64", "dev", tap, "nodad")
        yield made
