"""Settings of the host's network that rtnetlink cannot change: files below /proc/sys/net.

Source: Linux Documentation/networking/ip-sysctl.rst
"""

import os

from vmm_kvm.log import Log

log = Log(__name__)

DIRECTORY = "/proc/sys/net"


class Settings:
    """The settings in a directory."""

    def __init__(self, directory: str = DIRECTORY) -> None:
        """Use the files in `directory`."""
        self._directory = directory

    def set(self, interface: str, name: str, value: int) -> None:
        """Set an interface's IPv6 options; a kernel without IPv6 has none.

        Raises:
            OSError: the kernel refuses.
        """
        try:
            self._write(f"ipv6/conf/{interface}/{name}", str(value))
        except FileNotFoundError:
            return

    def open_loopback(self, interface: str, *, is_open: bool) -> None:
        """Let packets of 127.0.0.0/8 pass through an interface, or not; one may be gone by now.

        Raises:
            OSError: the kernel refuses.
        """
        try:
            self._write(f"ipv4/conf/{interface}/route_localnet", str(int(is_open)))
        except FileNotFoundError:
            if is_open:
                raise

    def forward_packets(self, *, ipv4: bool, ipv6: bool) -> None:
        """Let the kernel pass packets between interfaces.

        It stays that way: by the time we end, others may rely on it. IPv6 is left to the operator,
        because a host that forwards it ignores the routers of its own network.
        """
        try:
            if ipv4 and self._get("ipv4/ip_forward") == "0":
                self._write("ipv4/ip_forward", "1")
                log.info("nat and forwards: the host forwards IPv4 from now on")
            if ipv6 and self._get("ipv6/conf/all/forwarding") == "0":
                log.warning(
                    "nat: this host does not forward IPv6: net.ipv6.conf.all.forwarding is 0"
                )
        except OSError as err:
            log.warning("nat and forwards: %s: %s", err.filename, err.strerror)

    def _get(self, name: str) -> str:
        fd = os.open(f"{self._directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 64).decode().strip()
        finally:
            os.close(fd)

    def _write(self, name: str, value: str) -> None:
        fd = os.open(f"{self._directory}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
