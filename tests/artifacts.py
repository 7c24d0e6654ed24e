"""Kernels and images for guest tests: Debian's kernels, a busybox initramfs, memtest86+, SeaBIOS.

Kernel packages are downloaded with apt and unpacked into a cache, never installed. The cache is
`$VMM_CACHE`, else `~/.cache/vmm-kvm-tests`; a kernel in the cache is not downloaded again, so that
later runs need no network and compare with the same guest. Run as a module
(`python -m tests.artifacts [kernel ...]`) it fills the cache.

Concurrent callers are serialised by a lock file in the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.rig import initramfs, kvm_amd


class ArtifactError(Exception):
    """Something that guest tests boot is missing; the text says what to install."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package.

    `tree` holds `boot/` and `lib/modules/`, as `dpkg -x` leaves them and with depmod's tables.
    """

    name: str
    release: str
    tree: Path

    @property
    def vmlinuz(self) -> Path:
        """The kernel image, a bzImage."""
        return self.tree / "boot" / f"vmlinuz-{self.release}"

    def modules(self, names: Sequence[str]) -> tuple[Path, ...]:
        """Return the files of the modules and of their dependencies, in load order.

        A module that is built into this kernel contributes no file.

        Raises:
            ArtifactError: this kernel has no such module.
        """
        found: dict[Path, None] = {}
        for name in names:
            shown = subprocess.run(
                [
                    *("modprobe", "-d", self.tree, "-S", self.release),
                    *("--show-depends", "--ignore-install", name),
                ],
                check=False,
                capture_output=True,
                text=True,
                env=_tool_environment(),
            )
            if shown.returncode != 0:
                raise ArtifactError(f"{name}: no such module in {self.name}")
            for line in shown.stdout.splitlines():
                verb, _, path = line.strip().partition(" ")
                if verb == "insmod":
                    found[Path(path.strip())] = None
        return tuple(found)


# Names of kernels: the flavour, and whether the kernel is of the older or the newer of the two
# upstream series that the host's suites have. If they have one series, both are the same.
KERNELS = ("cloud", "generic", "newer-cloud", "newer-generic")
_NEWER = "newer-"
# Flavour to the metapackage that depends on the newest kernel of its suite.
_METAPACKAGES = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}

# Modules that a guest loads before it reports: the power button, its event device, the panic
# device.
GUEST_MODULES = ("button", "evdev", "pvpanic-mmio")
# Modules of a guest with disks; some kernels have them built in.
DISK_MODULES = ("virtio_pci", "virtio_blk", "ext4", "nd_pmem", "virtio_pmem")

# Modules of a guest with all our other devices.
MEDIA_MODULES = ("virtio_pci", "virtio_scsi", "sr_mod", "isofs", "virtio_rng", "virtio_console")

# Modules of a guest with a network.
NET_MODULES = ("virtio_pci", "virtio_net", "af_packet", "ipv6")

_MEMTEST = (Path("/boot/memtest86+x64.bin"), Path("/boot/mt86+x64"))
_SEABIOS = (Path("/usr/share/seabios/bios-256k.bin"), Path("/usr/share/qemu/bios-256k.bin"))


def cache_dir() -> Path:
    """Return the cache directory; makes it if there is none."""
    configured = os.environ.get("VMM_CACHE")
    path = Path(configured) if configured else Path.home() / ".cache" / "vmm-kvm-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def kernel(name: str) -> Kernel:
    """Return a kernel of `KERNELS`, downloaded and unpacked at the first call.

    Raises:
        ArtifactError: the package lists know no kernel, or it cannot be downloaded.
    """
    flavour = name.removeprefix(_NEWER)
    place = _place(name, flavour)
    if not _is_unpacked(place):
        with _locked():
            shown = _shown(_METAPACKAGES[flavour])
            if not candidates(shown, _series_of(place)):
                # The suite has moved to another series since the choice was made.
                _choice().unlink(missing_ok=True)
            place = _place(name, flavour)
            if not _is_unpacked(place):
                _download(candidates(shown, _series_of(place)), _METAPACKAGES[flavour], place)
    (release,) = (path.name for path in (place / "lib" / "modules").iterdir())
    return Kernel(place.name, release, place)


def distinct_kernels() -> tuple[str, ...]:
    """Return the names of `KERNELS` that stand for different kernels.

    All of them if the package lists know no kernel: `kernel` then says so.
    """
    try:
        older, newer = _series()
    except ArtifactError:
        return KERNELS
    return KERNELS if older != newer else KERNELS[:2]


def known_series(shown: str) -> list[str]:
    """Return the upstream series of a metapackage's versions, such as "6.1", oldest first.

    Args:
        shown: what `apt-cache show METAPACKAGE` prints: a paragraph per known version.
    """
    found = re.findall(r"^Version: (?:\d+:)?(\d+)\.(\d+)\.", shown, re.MULTILINE)
    numbers = sorted({(int(major), int(minor)) for major, minor in found})
    return [f"{major}.{minor}" for major, minor in numbers]


def _series() -> tuple[str, str]:
    """Return the older and the newer series of guests' kernels, chosen once for this cache."""
    choice = _choice()
    if not choice.exists():
        metapackage = _METAPACKAGES["cloud"]
        known = known_series(_shown(metapackage))
        if not known:
            raise ArtifactError(f"{metapackage}: apt knows no version; run make setup as root")
        choice.parent.mkdir(parents=True, exist_ok=True)
        scratch = choice.with_suffix(f".{os.getpid()}")
        scratch.write_text(f"{known[0]} {known[-1]}\n")
        scratch.rename(choice)
    older, newer = choice.read_text().split()
    return older, newer


def _choice() -> Path:
    return cache_dir() / "kernels" / "series"


def _place(name: str, flavour: str) -> Path:
    series = _series()[name.startswith(_NEWER)]
    return cache_dir() / "kernels" / f"{series}-{flavour}"


def _series_of(place: Path) -> str:
    return place.name.partition("-")[0]


def _shown(metapackage: str) -> str:
    try:
        return subprocess.run(
            ["apt-cache", "show", metapackage],
            check=False,
            capture_output=True,
            text=True,
            env=_tool_environment(),
        ).stdout
    except FileNotFoundError as error:
        raise ArtifactError(f"apt-cache: {error.strerror}: kernels come from Debian") from error


def guest_initramfs(of: Kernel) -> Path:
    """Return the initramfs that the guest tests boot with this kernel, built at the first call.

    It holds busybox, `GUEST_MODULES` and `initramfs.GUEST_INIT`; about 1 MiB.

    Raises:
        ArtifactError: static busybox or zstd is not installed.
    """
    return _initramfs(f"guest-{of.release}", of.modules(GUEST_MODULES), initramfs.GUEST_INIT)


def disk_initramfs(of: Kernel) -> Path:
    """Return the same with `DISK_MODULES`.

    Raises:
        ArtifactError: static busybox or zstd is not installed.
    """
    modules = of.modules((*GUEST_MODULES, *DISK_MODULES))
    return _initramfs(f"disk-{of.release}", modules, initramfs.GUEST_INIT)


def media_initramfs(of: Kernel) -> Path:
    """Return the same with `MEDIA_MODULES`.

    Raises:
        ArtifactError: static busybox or zstd is not installed.
    """
    modules = of.modules((*GUEST_MODULES, *MEDIA_MODULES))
    return _initramfs(f"media-{of.release}", modules, initramfs.GUEST_INIT)


def net_initramfs(of: Kernel) -> Path:
    """Return the same with `NET_MODULES`.

    Raises:
        ArtifactError: static busybox or zstd is not installed.
    """
    modules = of.modules((*GUEST_MODULES, *NET_MODULES))
    return _initramfs(f"net-{of.release}", modules, initramfs.GUEST_INIT)


def initramfs_with(of: Kernel, names: Sequence[str], stem: str) -> Path:
    """Return the same with other modules; `stem` is for the file's name.

    Raises:
        ArtifactError: this kernel has no such module, or static busybox or zstd is missing.
    """
    modules = of.modules((*GUEST_MODULES, *names))
    return _initramfs(f"{stem}-{of.release}", modules, initramfs.GUEST_INIT)


def plain_initramfs() -> Path:
    """Return an initramfs without modules, which any kernel can boot.

    Raises:
        ArtifactError: static busybox or zstd is not installed.
    """
    return _initramfs("guest-plain", (), initramfs.GUEST_INIT)


def rig_initramfs(of: Kernel) -> Path:
    """Return the rig's initramfs for this kernel, built at the first call.

    Raises:
        ArtifactError: static busybox or zstd is not installed, or its KVM is not as expected.
    """
    modules = [
        _rig_kvm(of, module) if module.name.startswith("kvm-amd.ko") else module
        for module in of.modules(initramfs.RIG_MODULES)
    ]
    return _initramfs(f"rig-{of.release}", modules, initramfs.RIG_INIT)


def _rig_kvm(of: Kernel, module: Path) -> Path:
    """Return the kernel's module changed for the rig, made at the first call."""
    code = hashlib.sha256(Path(kvm_amd.__file__).read_bytes()).hexdigest()[:12]
    place = cache_dir() / f"rig-{of.release}-{code}" / "kvm-amd.ko"
    if not place.exists():
        try:
            changed = kvm_amd.with_cr8_intercepted(initramfs.module_data(module))
        except kvm_amd.ModuleError as error:
            raise ArtifactError(f"{module}: {error}") from error
        with _locked():
            place.parent.mkdir(exist_ok=True)
            scratch = place.with_suffix(".part")
            scratch.write_bytes(changed)
            scratch.rename(place)
    return place


def memtest() -> Path:
    """Return Debian's memtest86+ image, a bzImage for x86-64.

    Raises:
        ArtifactError: it is not installed.
    """
    return _installed(_MEMTEST, "memtest86+")


def seabios() -> Path:
    """Return SeaBIOS's 256 KiB image.

    Raises:
        ArtifactError: it is not installed.
    """
    return _installed(_SEABIOS, "seabios")


def _installed(paths: Sequence[Path], package: str) -> Path:
    """Return the first of `paths` that exists: distributions name one file differently."""
    for path in paths:
        if path.exists():
            return path
    raise ArtifactError(f"{paths[0]}: not found; install the package {package}")


def _is_unpacked(place: Path) -> bool:
    return (place / "lib" / "modules").is_dir()


def _tool_environment() -> dict[str, str]:
    # modprobe, depmod and dpkg-deb live in sbin, which an unprivileged PATH leaves out.
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {**os.environ, "LC_ALL": "C", "PATH": f"{path}:/usr/sbin:/sbin"}


def run_tool(*command: str | Path, text: str | None = None) -> None:
    """Run a program that makes images, `text` its input.

    Raises:
        ArtifactError: it is not installed, or it fails; the text has what it said last.
    """
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            input=text,
            env=_tool_environment(),
        )
    except FileNotFoundError as err:
        raise ArtifactError(f"{command[0]}: not found; run make setup as root") from err
    except subprocess.CalledProcessError as err:
        raise ArtifactError(f"{command[0]}: {err.stderr.strip()[-2000:]}") from err


@contextmanager
def _locked() -> Iterator[None]:
    with (cache_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def candidates(shown: str, series: str) -> list[str]:
    """Return the kernel packages that a metapackage's versions depend on, newest first.

    Args:
        shown: what `apt-cache show METAPACKAGE` prints: a paragraph per known version.
        series: upstream series, such as "6.1"; versions of others are left out.
    """
    found: list[tuple[tuple[int, ...], str]] = []
    for paragraph in shown.split("\n\n"):
        version = re.search(r"^Version: (?:\d+:)?(\S+)$", paragraph, re.MULTILINE)
        depends = re.search(r"^Depends: (?:.*, )?(linux-image-\S+)", paragraph, re.MULTILINE)
        if version and depends and version[1].startswith(f"{series}."):
            key = tuple(int(number) for number in re.findall(r"\d+", version[1]))
            found.append((key, depends[1]))
    return list(dict.fromkeys(package for _, package in sorted(found, reverse=True)))


def _download(packages: Sequence[str], metapackage: str, place: Path) -> None:
    # An index may name a version that the archive has replaced meanwhile: try an older one.
    errors = []
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as scratch:
        for package in packages:
            fetched = subprocess.run(
                ["apt-get", "-q", "-o", "Acquire::Retries=3", "download", *_parts(package)],
                check=False,
                capture_output=True,
                text=True,
                cwd=scratch,
                env=_tool_environment(),
            )
            archives = list(Path(scratch).glob("*.deb"))
            if fetched.returncode == 0 and archives:
                _unpack(archives, Path(scratch) / "tree", place)
                return
            errors.append(f"{package}: {fetched.stderr.strip().splitlines()[-1:]}")
    why = "; ".join(errors) or "apt knows no kernel that it depends on; run make setup as root"
    raise ArtifactError(f"{metapackage}: cannot download: {why}")


def _parts(package: str) -> list[str]:
    """Return the packages that hold a kernel; Debian testing splits it into several."""
    shown = _shown(package).partition("\n\n")[0]
    return [package, *re.findall(r"\b(linux-(?:base|binary|modules)-\d[^\s,]+)", shown)]


def _unpack(archives: Sequence[Path], tree: Path, place: Path) -> None:
    """Arrange a kernel's files as `Kernel` says, whatever their places in the packages."""
    environment = _tool_environment()
    for archive in archives:
        subprocess.run(["dpkg", "-x", archive, tree], check=True, env=environment)
    modules, boot = tree / "lib" / "modules", tree / "boot"
    if not modules.is_dir():
        modules.parent.mkdir()
        (tree / "usr" / "lib" / "modules").rename(modules)
    (release,) = (path.name for path in modules.iterdir())
    boot.mkdir(exist_ok=True)
    image = modules / release / "vmlinuz"
    if image.exists():
        image.rename(boot / f"vmlinuz-{release}")
    subprocess.run(["depmod", "-b", tree, release], check=True, env=environment)
    place.parent.mkdir(parents=True, exist_ok=True)
    tree.rename(place)


def _initramfs(stem: str, modules: Sequence[Path], init: str) -> Path:
    busybox = shutil.which("busybox", path=_tool_environment()["PATH"])
    if busybox is None or shutil.which("zstd") is None:
        raise ArtifactError("busybox or zstd: not found; install busybox-static and zstd")
    recipe = initramfs.recipe(Path(busybox), modules, init)
    image = cache_dir() / f"initramfs-{stem}-{recipe}.img"
    if not image.exists():
        with _locked():
            scratch = image.with_suffix(".part")
            scratch.write_bytes(initramfs.build(Path(busybox), modules, init))
            scratch.rename(image)
    return image


def main(names: Sequence[str]) -> int:
    """Fill the cache with the named kernels and their initramfs images, by default all."""
    unknown = set(names) - set(KERNELS)
    if unknown:
        print(f"artifacts: known kernels are {', '.join(KERNELS)}", file=sys.stderr)
        return 2
    try:
        for name in names or distinct_kernels():
            unpacked = kernel(name)
            size = guest_initramfs(unpacked).stat().st_size
            print(f"{name}: {unpacked.release}, initramfs {size >> 10} KiB")
        rig_initramfs(kernel("generic"))
        plain_initramfs()
    except ArtifactError as error:
        print(f"artifacts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
