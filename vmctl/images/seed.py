"""The seed of `--cloud-init`, `--ssh-key` and `--agent`: a disk from which a guest sets itself up.

It is a small ISO image with the label cidata, which cloud-init looks for (its NoCloud source). The
user's data stand in it as they are; ours are vendor-data, which cloud-init joins to them.

For a VM of the daemon the image is a file named by its content: a VM that boots again, or goes on
from a snapshot, finds it, and cloud-init takes a seed with the same content for the same machine.
"""

import hashlib
import json
import os
import re
import stat
import time
from base64 import encodebytes
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Protocol

from vmctl.images.iso9660 import iso_image
from vmctl.values import once
from vmm_kvm.errors import ImageError, SpecError
from vmm_kvm.new_file import NewFile, write_whole

LABEL = "cidata"
_USER, _META, _VENDOR, _NETWORK = "user-data", "meta-data", "vendor-data", "network-config"
_NAMES = (_USER, _META, _VENDOR, _NETWORK)
_FILE_MAX = 16 << 20
_KEYS_MAX = 64 << 10
_NO_USER_DATA = b"#cloud-config\n{}\n"
_BEGINNINGS = (b"#", b"Content-Type:", b"MIME-Version:", b"\x1f\x8b")
_HOST_MAX = 63
SETTLED_S = 3600
"""How long a seed stays at least, for the VM that it was made for to open it."""
_SEED = re.compile(r"[0-9a-f]{64}\.iso", re.ASCII)
_KEY = re.compile(r"[a-z0-9@.-]+ +[A-Za-z0-9+/]+=*( .*)?", re.ASCII)
_BOUNDARY = "=== vmctl ==="
_AGENT_SCRIPT = """#!/bin/sh
set -eu
umask 022
mkdir -p /usr/local/sbin
base64 -d >/usr/local/sbin/vmm-agent <<'END'
{agent}END
chmod 755 /usr/local/sbin/vmm-agent
if [ -d /run/systemd/system ]; then
	base64 -d >/etc/systemd/system/vmm-agent.service <<'END'
{unit}END
	systemctl daemon-reload
	systemctl enable vmm-agent
	systemctl restart --no-block vmm-agent
else
	setsid /usr/local/sbin/vmm-agent </dev/null >/dev/null 2>&1 &
fi
"""


class SeedOptions(Protocol):
    """The command line's words for it."""

    @property
    def cloud_init(self) -> tuple[str, ...]:
        """The path of user-data, or of a directory."""

    @property
    def ssh_keys(self) -> tuple[str, ...]:
        """Paths of public keys."""

    @property
    def agent(self) -> bool:
        """Whether the guest gets the agent."""

    @property
    def vsock(self) -> tuple[str, ...]:
        """How the agent is reached."""


def seed_disk(name: str, options: SeedOptions) -> str:
    """Return the disk, as `-d` takes it, that a VM of this name gets beside its own: a file.

    Raises:
        SpecError: a file cannot be read or written, or makes no sense.
    """
    stored = _stored(seed_image(name, options))
    return f"raw:{stored.replace(',', ',,')},ro"


def seed_image(name: str, options: SeedOptions) -> bytes:
    """Return the image of the disk that a VM of this name gets beside its own.

    Raises:
        SpecError: a file cannot be read, or makes no sense.
    """
    if options.agent and not options.vsock:
        raise SpecError("--agent is reached by a vsock device: add --vsock path")
    path = once(options.cloud_init, "cloud-init")
    files = {} if path is None else _given(path)
    keys = [key for file in options.ssh_keys for key in _keys(file)]
    if keys and _META in files:
        raise SpecError(f"{path}: its meta-data has the keys: no --ssh-key beside it")
    if (keys or options.agent) and _VENDOR in files:
        raise SpecError(f"{path}: vendor-data, --ssh-key and --agent: use one")
    files.setdefault(_USER, _NO_USER_DATA)
    if keys or options.agent:
        files[_VENDOR] = _vendor_data(has_keys=bool(keys), has_agent=options.agent)
    if _META not in files:
        files[_META] = _meta_data(name, keys, files)
    return iso_image(LABEL, files)


# The user's files


def _given(path: str) -> dict[str, bytes]:
    if not os.path.isdir(path):
        return {_USER: _user_data(path)}
    found = {}
    for name in _NAMES:
        file = os.path.join(path, name)
        if os.path.lexists(file):
            found[name] = _user_data(file) if name == _USER else _read(file, _FILE_MAX)
    if _USER not in found and _META not in found:
        raise SpecError(f"{path}: neither {_USER} nor {_META} is in it")
    return found


def _user_data(path: str) -> bytes:
    """Read user-data; cloud-init ignores data whose first line does not name their kind."""
    data = _read(path, _FILE_MAX)
    if data.strip() and not data.startswith(_BEGINNINGS):
        raise SpecError(f"{path}: no user-data: the first line is '#cloud-config', or '#!'")
    return data


def _read(path: str, most: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
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
    text = _read(path, _KEYS_MAX).decode(errors="replace")
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


def _vendor_data(*, has_keys: bool, has_agent: bool) -> bytes:
    """Return what lets root log in by those keys, and installs the agent."""
    parts = []
    if has_keys:
        parts.append(("cloud-config", "#cloud-config\ndisable_root: false\n"))
    if has_agent:
        parts.append(("x-shellscript", _agent_script()))
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


def _agent_script() -> str:
    import vmm_agent  # noqa: PLC0415 - few guests get it

    folder = os.path.dirname(vmm_agent.__file__)
    texts = {}
    for what, name in (("agent", "agent.py"), ("unit", "vmm-agent.service")):
        texts[what] = encodebytes(_read(os.path.join(folder, name), _FILE_MAX)).decode()
    return _AGENT_SCRIPT.format_map(texts)


# The image


def _folder() -> str:
    base = os.environ.get("XDG_STATE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.local/state")
    return os.path.join(base, "vmm-kvm", "seeds")


def seeds() -> list[str]:
    """Return the paths of this user's seeds that are old enough for a VM to have them open.

    Raises:
        OSError: they cannot be listed.
    """
    folder, found = _folder(), []
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if _SEED.fullmatch(name) and time.time() - os.lstat(path).st_mtime > SETTLED_S:
                found.append(path)
    return found


def prune_seeds(needed: Collection[str]) -> int:
    """Remove the seeds that no VM has, but for those with names in `needed`; returns their bytes.

    Raises:
        OSError: one cannot be removed.
    """
    from vmm_kvm.block.locks import lock  # noqa: PLC0415 - only here

    freed = 0
    for path in seeds():
        if os.path.basename(path) in needed:
            continue
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            lock(fd, path, writes=True)
            freed += os.fstat(fd).st_size
            os.unlink(path)
        except ImageError:  # a VM has it
            continue
        finally:
            os.close(fd)
    return freed


def _stored(image: bytes) -> str:
    """Return the path of a file with this content, which this user alone can read."""
    folder = _folder()
    path = os.path.join(folder, f"{hashlib.sha256(image).hexdigest()}.iso")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.path.exists(path):
            os.utime(path)  # it is not removed before the VM has it open
        else:
            with NewFile(path, replaces=True) as file:
                write_whole(file.fd, [image])
                file.publish()
    except OSError as err:
        raise SpecError(f"{err.filename or folder}: {err.strerror}") from err
    return path
