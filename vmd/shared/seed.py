"""The files of a seed: the user's as they are, and ours, which cloud-init joins to them.

It is a small ISO image with the label cidata, which cloud-init looks for (its NoCloud source).
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from vmd.config.seeds import SeedOption
from vmm_kvm.errors import SpecError
from vmm_kvm.images.iso9660 import iso_image

LABEL = "cidata"
_USER, _META, _VENDOR, _NETWORK = "user-data", "meta-data", "vendor-data", "network-config"
_NAMES = (_USER, _META, _VENDOR, _NETWORK)
FILE_MAX = 16 << 20
_KEYS_MAX = 64 << 10
_NO_USER_DATA = b"#cloud-config\n{}\n"
_BEGINNINGS = (b"#", b"Content-Type:", b"MIME-Version:", b"\x1f\x8b")
_HOST_MAX = 63
_KEY = re.compile(r"[a-z0-9@.-]+ +[A-Za-z0-9+/]+=*( .*)?", re.ASCII)
_BOUNDARY = "=== vmctl ==="


def seed_image(name: str, option: SeedOption, script: str = "") -> bytes:
    """Return the image for a VM of this name; its guest runs `script` at the first boot.

    Raises:
        SpecError: a file cannot be read, or makes no sense.
    """
    path = option.cloud_init
    files = _given(path) if path else {}
    keys = [key for file in option.ssh_keys for key in _keys(file)]
    if keys and _META in files:
        raise SpecError(f"{path}: its meta-data has the keys: no ssh key beside it")
    if (keys or script) and _VENDOR in files:
        raise SpecError(f"{path}: vendor-data, ssh keys and an agent: use one")
    files.setdefault(_USER, _NO_USER_DATA)
    if keys or script:
        files[_VENDOR] = _vendor_data(has_keys=bool(keys), script=script)
    if _META not in files:
        files[_META] = _meta_data(name, keys, files)
    return iso_image(LABEL, files)


# The user's files


def _given(path: str) -> dict[str, bytes]:
    if not Path(path).is_dir():
        return {_USER: _user_data(path)}
    found = {}
    for name in _NAMES:
        file = f"{path}/{name}"
        if os.path.lexists(file):
            found[name] = _user_data(file) if name == _USER else read_file(file, FILE_MAX)
    if _USER not in found and _META not in found:
        raise SpecError(f"{path}: neither {_USER} nor {_META} is in it")
    return found


def _user_data(path: str) -> bytes:
    """Read user-data; cloud-init ignores data whose first line does not name their kind."""
    data = read_file(path, FILE_MAX)
    if data.strip() and not data.startswith(_BEGINNINGS):
        raise SpecError(f"{path}: no user-data: the first line is '#cloud-config', or '#!'")
    return data


def read_file(path: str, most: int) -> bytes:
    """Return a regular file of at most so many bytes.

    Raises:
        SpecError: it is none, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SpecError(f"{path}: not a regular file")
            data = file.read(most + 1)
    except OSError as err:
        raise SpecError(f"{path}: {err.strerror}") from err
    if len(data) > most:
        raise SpecError(f"{path}: more than {most} bytes")
    return data


def _keys(path: str) -> list[str]:
    """Return the public keys of a file, a line each."""
    text = read_file(path, _KEYS_MAX).decode(errors="replace")
    if "PRIVATE KEY" in text:
        raise SpecError(f"{path}: a private key: use {path}.pub")
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not all(_KEY.fullmatch(key) and key.isprintable() for key in keys):
        raise SpecError(f"{path}: no public key")
    return keys


# Ours


def _meta_data(name: str, keys: Sequence[str], files: dict[str, bytes]) -> bytes:
    """Return what tells a guest its name, keys, and whether it has been set up by this before."""
    host = _host_name(name)
    digest = hashlib.sha256(repr((host, keys, sorted(files.items()))).encode()).hexdigest()
    fields = {"instance-id": f"vmm-{digest[:32]}", "local-hostname": host, "public-keys": keys}
    return json.dumps({name: value for name, value in fields.items() if value}, indent=1).encode()


def _host_name(name: str) -> str:
    letters = "".join(one if one.isascii() and one.isalnum() else "-" for one in name)
    return letters[:_HOST_MAX].strip("-") or "vm"


def _vendor_data(*, has_keys: bool, script: str) -> bytes:
    """Return what lets root log in by those keys, and installs the agent."""
    parts = []
    if has_keys:
        parts.append(("cloud-config", "#cloud-config\ndisable_root: false\n"))
    if script:
        parts.append(("x-shellscript", script))
    lines = [f'Content-Type: multipart/mixed; boundary="{_BOUNDARY}"', "MIME-Version: 1.0", ""]
    for kind, text in parts:
        lines += [
            f"--{_BOUNDARY}",
            f'Content-Type: text/{kind}; charset="us-ascii"',
            "MIME-Version: 1.0",
            f'Content-Disposition: attachment; filename="vmctl-{kind}"',
            "",
            text,
        ]
    return "\n".join((*lines, f"--{_BOUNDARY}--", "")).encode()
