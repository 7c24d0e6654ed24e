"""The user's options of a boot, besides the image itself."""

from vmm_kvm.arch.x86.acpi import AcpiTables
from vmm_kvm.arch.x86.e820 import E820Entry, e820_map
from vmm_kvm.arch.x86.layout import SMBIOS_START
from vmm_kvm.arch.x86.smbios import SmbiosTables
from vmm_kvm.boot.cache import Kernels
from vmm_kvm.boot.source import FileSource
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory
from vmm_kvm.record import Record

_E820_MAX = 128


class BootConfig(Record):
    """The options of one boot."""

    command_line: str | None = None
    """For kernels that take one; None leaves it empty."""
    initrd: tuple[str | FileSource, ...] = ()
    """Initial RAM disks, open or by path: Linux sees them as one, for others they are modules."""
    modules: tuple[tuple[str, str], ...] = ()
    """(path, command line) of each further boot module."""
    acpi: AcpiTables | None = None
    """Written into guest memory, except for firmware, which fetches them through fw_cfg."""
    smbios: SmbiosTables | None = None
    """Built for `layout.SMBIOS_START`; likewise."""
    e820: tuple[E820Entry, ...] = ()
    """The memory map for the kernel; when empty, the one that `e820_map` makes of its memory."""
    boot_device: BootDevice = BootDevice.AUTO
    lladdr: bytes | None = None
    """Six bytes: the first NIC's address, which OpenBSD learns when it boots from `NET`."""
    seed: bool = True
    """Give Linux 32 random bytes, which matter where the processor has no RDRAND. The kernel then
    prints its memory map twice, 0.8 kB on a console."""
    unpack: bool = True
    """Unpack Linux on the host where possible; else the kernel's own decompressor runs."""
    cache_directory: str | None = None
    """The directory of unpacked kernels, such as `cache.default_directory()`; None keeps none."""
    kernels: Kernels | None = None
    """Keeps them instead."""
    encrypted: int = 0
    """The C-bit, as a mask, of a guest whose memory is encrypted; else 0."""


def command_line_bytes(name: str, config: BootConfig, limit: int) -> bytes:
    """Return the command line with its NUL; `limit` is in bytes without it.

    Raises:
        BootError: it is too long or contains a NUL.
    """
    text = (config.command_line or "").encode(errors="surrogateescape")
    if b"\0" in text:
        raise BootError(f"{name}: command line: contains a NUL character")
    if len(text) > limit:
        raise BootError(f"{name}: command line: {len(text)} bytes, the kernel takes {limit}")
    return text + b"\0"


def refuse(
    name: str,
    kind: str,
    config: BootConfig,
    *,
    command_line: bool = False,
    initrd: bool = False,
    modules: bool = False,
) -> None:
    """Refuse options that this kind of image cannot use; True marks each one to refuse.

    Raises:
        BootError: one of them is set.
    """
    if command_line and config.command_line:
        raise BootError(f"{name}: {kind} takes no command line: '{config.command_line}'")
    if initrd and config.initrd:
        raise BootError(f"{name}: {kind} takes no initrd: {config.initrd[0]}")
    if modules and config.modules:
        raise BootError(f"{name}: {kind} takes no modules: {config.modules[0][0]}")


def open_modules(config: BootConfig) -> list[tuple[FileSource, bytes]]:
    """Open the RAM disks and the modules, in this order, with their command lines and NULs.

    Raises:
        BootError: a file cannot be read, or a command line contains a NUL.
    """
    opened = []
    for file, text in (*((file, "") for file in config.initrd), *config.modules):
        line = text.encode(errors="surrogateescape")
        if b"\0" in line:
            raise BootError(f"{file}: command line: contains a NUL character")
        opened.append((FileSource.of(file), line + b"\0"))
    return opened


def memory_map(memory: GuestMemory, config: BootConfig) -> tuple[E820Entry, ...]:
    """Return the memory map that the kernel is to see.

    Raises:
        BootError: it has more entries than Linux and the page for it take.
    """
    entries = config.e820 or e820_map(memory.regions)
    if len(entries) > _E820_MAX:
        raise BootError(f"memory map: {len(entries)} entries, at most {_E820_MAX} are possible")
    return entries


def place_smbios(memory: GuestMemory, config: BootConfig) -> None:
    """Write the SMBIOS tables, if any, where kernels look for them."""
    if config.smbios is not None:
        memory.write(SMBIOS_START, config.smbios.blob)


def place_acpi(memory: GuestMemory, config: BootConfig) -> int:
    """Write the ACPI tables, if any, where they belong; return the RSDP's address, or 0."""
    if config.acpi is None:
        return 0
    memory.write(config.acpi.base, config.acpi.blob)
    return config.acpi.rsdp
