"""How disk images of every format begin: what a raw disk must not come to look like.

The format of an image is often found out by its first sector, and the guest of a raw disk writes
that sector. One that wrote another format's header there would have its disk opened as such an
image the next time, by this program or by QEMU; and headers name other files of the host.

LUKS is not among them: it names no file, and guests encrypt whole disks.

Source: the specifications in QEMU's docs/interop; QEMU block/raw-format.c refuses the same.
"""

SECTOR_SIZE = 512

_SIGNATURES = (
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("Bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
_VMDK_LINE = b"version="


def image_format(sector: bytes) -> str | None:
    """Return the name of the format that an image with this first sector is taken for.

    None if that is raw.
    """
    for name, offset, signature in _SIGNATURES:
        if sector.startswith(signature, offset):
            return name
    return "VMDK" if _is_vmdk_text(sector) else None


def _is_vmdk_text(sector: bytes) -> bool:
    """Tell whether this is a descriptor: lines of text, the first of which says the version."""
    for line in sector.splitlines():
        if line.strip(b" \r\t") and not line.startswith(b"#"):
            return line.startswith(_VMDK_LINE)
    return False
