"""Small ISO 9660 images: a few files in one directory, with names of any letters by Rock Ridge.

Source: ECMA-119 (4th edition) sections 8.4, 8.3, 9.1 and 9.4; SUSP 1.12; RRIP 1.12 sections 4.1.1
and 4.1.4.
"""

import struct
from collections.abc import Mapping

SECTOR = 2048
_DESCRIPTOR, _TERMINATOR, _PATHS_LITTLE, _PATHS_BIG, _ROOT, _FIRST = 16, 17, 18, 19, 20, 21
_IS_DIRECTORY = 2
_DIRECTORY, _FILE = 0o040555, 0o100444
_LABEL_MAX = 32
_FILES_MAX = 8
_DATE = bytes(7)
_NO_DATE = b"0" * 16 + b"\0"
_EXTENSION = b"RRIP_1991A"


def iso_image(label: str, files: Mapping[str, bytes]) -> bytes:
    """Return an image with this label and these files, which root owns and anybody may read.

    At most eight files; no date is in it, so the same files make the same image.
    """
    assert len(files) <= _FILES_MAX
    assert len(label) <= _LABEL_MAX
    names = sorted((_plain(name), name) for name in files)
    assert len({plain for plain, _ in names}) == len(files)
    records = [
        _record(b"\0", _ROOT, SECTOR, _IS_DIRECTORY, _sharing() + _mode(_DIRECTORY, 2)),
        _record(b"\1", _ROOT, SECTOR, _IS_DIRECTORY, _mode(_DIRECTORY, 2)),
    ]
    contents = bytearray()
    for plain, name in names:
        data = files[name]
        at = _FIRST + len(contents) // SECTOR
        own = _mode(_FILE, 1) + _name(name.encode())
        records.append(_record(plain, at, len(data), 0, own))
        contents += data + bytes(-len(data) % SECTOR)
    size = _FIRST + len(contents) // SECTOR
    paths = (struct.pack(f"{order}BBIH", 1, 0, _ROOT, 1) + bytes(2) for order in "<>")
    sectors = (
        _descriptor(label.encode("ascii"), size),
        struct.pack("<B5sB", 255, b"CD001", 1),
        *paths,
        b"".join(records),
    )
    image = bytearray(_DESCRIPTOR * SECTOR)
    for sector in sectors:
        assert len(sector) <= SECTOR
        image += sector.ljust(SECTOR, b"\0")
    return bytes(image + contents)


def _descriptor(label: bytes, size: int) -> bytes:
    """Return the primary volume descriptor of an image of `size` sectors."""
    text = b" "
    return b"".join(
        (
            struct.pack("<B5sBx32s32s8x", 1, b"CD001", 1, text * 32, label.ljust(32)),
            _both(size),
            bytes(32),
            *(_both16(number) for number in (1, 1, SECTOR)),
            _both(10),  # bytes of the path table
            struct.pack("<II", _PATHS_LITTLE, 0),
            struct.pack(">II", _PATHS_BIG, 0),
            _record(b"\0", _ROOT, SECTOR, _IS_DIRECTORY, b""),
            text * (4 * 128 + 3 * 37),  # who made it, and of what
            _NO_DATE * 4,
            b"\1\0",
        )
    )


def _record(name: bytes, at: int, size: int, flags: int, extensions: bytes) -> bytes:
    """Return a directory's record of a file at sector `at`."""
    body = b"".join(
        (
            b"\0",
            _both(at),
            _both(size),
            _DATE,
            bytes((flags, 0, 0)),
            _both16(1),
            bytes((len(name),)),
            name,
            b"" if len(name) % 2 else b"\0",
            extensions,
        )
    )
    body += bytes((len(body) + 1) % 2)
    return bytes((len(body) + 1,)) + body


def _plain(name: str) -> bytes:
    """Return a name of eight letters that stands for one of any, for who knows no Rock Ridge."""
    letters = "".join(one for one in name.upper() if one.isascii() and one.isalnum())
    return f"{letters[:8]}.;1".encode()


def _sharing() -> bytes:
    """Return what says, in the root directory, that there are extensions, and which."""
    name = struct.pack("<2sBBBBBB", b"ER", 8 + len(_EXTENSION), 1, len(_EXTENSION), 0, 0, 1)
    return b"SP\x07\x01\xbe\xef\x00" + name + _EXTENSION


def _mode(mode: int, links: int) -> bytes:
    return b"PX\x24\x01" + b"".join(map(_both, (mode, links, 0, 0)))


def _name(name: bytes) -> bytes:
    return struct.pack("<2sBBB", b"NM", 5 + len(name), 1, 0) + name


def _both(number: int) -> bytes:
    """Return a number in both orders of bytes."""
    return struct.pack("<I", number) + struct.pack(">I", number)


def _both16(number: int) -> bytes:
    return struct.pack("<H", number) + struct.pack(">H", number)
