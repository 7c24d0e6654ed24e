"""First sectors of disk images of every format, which a raw disk must not imitate.

The format of an image is often found out by its first sector, and the guest of a raw disk writes
that sector. One that wrote another format's header there would have its disk opened as such an
image the next time, by this program or by QEMU; and headers name other files of the host.

LUKS is not among them: it names no file, and guests encrypt whole disks. Nor are archives: what
`foreign` says of those is for whoever has one for a disk by mistake.

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
_VHD_FOOTER = b"conectix"
# Source: the file formats' own specifications.
_COMPRESSED = (
    ("gzip", b"\x1f\x8b"),
    ("xz", b"\xfd7zXZ\0"),
    ("zstd", b"\x28\xb5\x2f\xfd"),
    ("bzip2", b"BZh"),
    ("lz4", b"\x04\x22\x4d\x18"),
    ("lzip", b"LZIP"),
    ("lzop", b"\x89LZO\0\r\n\x1a\n"),
    ("lzma", b"\x5d\0\0\x80\0" + b"\xff" * 8),
    ("lrzip", b"LRZI"),
    ("compress", b"\x1f\x9d"),
)
# A tar archive is none: guests read and write such on whole disks.
_ARCHIVES = (
    ("zip", b"PK\x03\x04"),
    ("7z", b"7z\xbc\xaf\x27\x1c"),
    ("RAR", b"Rar!\x1a\x07"),
    ("WIM", b"MSWIM\0\0\0"),
    ("cabinet", b"MSCF\0\0\0\0"),
    ("xar", b"xar!\0\x1c\0\1"),
    ("Proxmox backup", b"VMA\0\0\0\0\1"),
    ("partclone", b"partclone-image"),
)
# Left behind by a failed download.
_PAGES = (
    ("a web page", b"<!doctype html"),
    ("a web page", b"<html"),
    ("an XML document", b"<?xml version="),
    ("a pointer of Git LFS", b"version https://git-lfs.github.com/"),
)
_SPARSE = b"\x3a\xff\x26\xed\1\0"
"""Source: Android's libsparse, sparse_format.h."""
_EWF = b"EVF\t\r\n\xff\0"
_DMG_FOOTER = b"koly"
_TAR, _TAR_OFFSET, _TAR_NAME_MAX = b"ustar", 257, 100
_OVF = b".ovf"
_EXTENSIONS = {
    "vmdk": "VMDK",
    "vdi": "VDI",
    "vhd": "VHD",
    "vpc": "VHD",
    "vhdx": "VHDX",
    "qed": "QED",
    "hdd": "Parallels",
    "hds": "Parallels",
    "dmg": "DMG",
    "qcow": "QCOW",
    "e01": "EWF",
    "simg": "Android sparse",
}
_PACKED = (
    *("gz", "tgz", "xz", "txz", "zst", "zstd", "bz2", "lz4", "lzma", "lzo", "lz", "z"),
    *("zip", "7z", "rar", "ova", "wim"),
)


def image_format(sector: bytes) -> str | None:
    """Return the name of the format that an image with this first sector is taken for.

    None if that is raw.
    """
    for name, offset, signature in _SIGNATURES:
        if sector.startswith(signature, offset):
            return name
    return "VMDK" if _is_vmdk_text(sector) else None


def foreign(name: str, first: bytes, last: bytes) -> str | None:
    """Say in one line why a file is no raw image, if it is plainly something else.

    `first` and `last` are its first and last sector. Only for a file whose format the user did not
    name.
    """
    for method, signature in _COMPRESSED:
        if first.startswith(signature):
            return f"{name}: compressed by {method}: unpack it first, or say raw:{name}"
    for kind, signature in _ARCHIVES:
        if first.startswith(signature):
            return f"{name}: a {kind} archive: unpack it first, or say raw:{name}"
    begin = first.lstrip()[:64].lower()
    for what, signature in _PAGES:
        if begin.startswith(signature):
            return f"{name}: {what}, not a disk: download it again, or say raw:{name}"
    member = first[:_TAR_NAME_MAX].partition(b"\0")[0]
    if first.startswith(_TAR, _TAR_OFFSET) and member.endswith(_OVF):
        return f"{name}: an OVA archive: unpack it by tar first, or say raw:{name}"
    found = image_format(first)
    if found is None:
        ends = (("VHD", _VHD_FOOTER), ("DMG", _DMG_FOOTER))
        found = next((each for each, footer in ends if last.startswith(footer)), None)
        begins = (("Android sparse", _SPARSE), ("EWF", _EWF))
        found = found or next((each for each, mark in begins if first.startswith(mark)), None)
    return None if found in {None, "qcow2"} else _refusal(name, found)


def foreign_name(name: str) -> str | None:
    """Say in one line why a new image of this name would mislead, if it would; see `foreign`."""
    extension = name.rpartition(".")[2].lower()
    if extension in _PACKED:
        return f"{name}: named like a packed file: choose another name, or say raw:{name}"
    found = _EXTENSIONS.get(extension)
    return None if found is None else _refusal(name, found)


def _refusal(name: str, found: str | None) -> str:
    return (
        f"{name}: {found} images are not supported: "
        f"use qemu-img convert -O qcow2, or say raw:{name}"
    )


def _is_vmdk_text(sector: bytes) -> bool:
    """Tell whether this is a descriptor: lines of text, the first of which says the version."""
    for line in sector.splitlines():
        if line.strip(b" \r\t") and not line.startswith(b"#"):
            return line.startswith(_VMDK_LINE)
    return False
