"""The seed of `--cloud-init`, `--ssh-key` and `--agent`: a disk from which a guest sets itself up.

For a VM of the daemon the image is a file named by its content: a VM that boots again, or goes on
from a snapshot, finds it, and cloud-init takes a seed with the same content for the same machine.
"""

import hashlib
import os
import re
import time
from base64 import encodebytes
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

from vmctl.values import once
from vmd.config.seeds import SeedOption
from vmd.shared import seed
from vmm_kvm.errors import ImageError, SpecError
from vmm_kvm.new_file import NewFile, write_whole

SETTLED_S = 3600
"""How long a seed stays at least, for the VM that it was made for to open it."""
_SEED = re.compile(r"[0-9a-f]{64}\.iso", re.ASCII)
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
    script = _agent_script() if options.agent else ""
    return seed.seed_image(name, seed_option(options), script)


def seed_option(options: SeedOptions) -> SeedOption:
    """Return what --cloud-init and --ssh-key say.

    Raises:
        SpecError: it is said twice.
    """
    return SeedOption(once(options.cloud_init, "cloud-init") or "", options.ssh_keys)


def _agent_script() -> str:
    import vmm_agent  # noqa: PLC0415 - few guests get it

    folder = os.path.dirname(vmm_agent.__file__)
    texts = {}
    for what, name in (("agent", "agent.py"), ("unit", "vmm-agent.service")):
        texts[what] = encodebytes(
            seed.read_file(os.path.join(folder, name), seed.FILE_MAX)
        ).decode()
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
