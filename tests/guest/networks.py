"""A network for a guest: a network namespace of its own, with a tap."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TAP = "tap0"
HOST, GUEST = "10.99.0.1", "10.99.0.2"
HOST6, GUEST6 = "fd99::1", "fd99::2"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace by its name."""

    name: str

    def command(self, *arguments: str) -> list[str]:
        """Return what runs a command in it."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def run(self, *arguments: str) -> str:
        """Run a command in it, which has to succeed; returns what it printed."""
        done = subprocess.run(self.command(*arguments), check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def ip(self, *arguments: str) -> str:
        """Run the command `ip` for it, which has to succeed; returns what it printed."""
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
def network(*, queues: int = 1, mtu: int = 1500) -> Iterator[Namespace]:
    """Make a namespace in which `TAP` has the addresses of the host."""
    with namespace() as made:
        several = ["multi_queue"] if queues > 1 else []
        made.ip("tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr", *several)
        made.ip("link", "set", TAP, "mtu", str(mtu), "up")
        made.ip("addr", "add", f"{HOST}/24", "dev", TAP)
        made.ip("addr", "add", f"{HOST6}/64", "dev", TAP, "nodad")
        yield made
