"""`vmctl doctor`: can this host run VMs, how fast, and what is missing?

Exit status: 0 when VMs can run, 1 when they cannot.
"""

import json
import os
import pwd
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from vmctl.advice import may_connect
from vmctl.client import Client, CommandError
from vmd.config.sizes import fmt_scaled
from vmd.shared.paths import client_socket
from vmm_kvm import primitives
from vmm_kvm.boot.firmware import BIOS, UEFI, find_firmware
from vmm_kvm.errors import BootError, VmmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.sev import DEVICE, platform
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.machine.speed import guest_speed
from vmm_kvm.primitives import Vmm
from vmm_kvm.text import printable

# A guest in hardware executes the loop at one instruction a cycle or so; emulation takes hundreds.
_HARDWARE_SPEED = 100_000_000


class Status(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    LIMITED = "limited"
    """VMs run, but some part is slow or unusable."""
    MISSING = "missing"
    """No VM runs."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    detail: str
    hint: str = ""


_CAPABILITIES = {
    "irqchip": (abi.KVM_CAP_IRQCHIP, "interrupt controllers in the kernel"),
    "pit2": (abi.KVM_CAP_PIT2, "timer in the kernel"),
    "user-memory": (abi.KVM_CAP_USER_MEMORY, "guest RAM in user memory"),
    "readonly-mem": (abi.KVM_CAP_READONLY_MEM, "read-only memory slots, for firmware"),
    "immediate-exit": (abi.KVM_CAP_IMMEDIATE_EXIT, "pause without a race"),
    "irqfd": (abi.KVM_CAP_IRQFD, "interrupts from other processes"),
    "ioeventfd": (abi.KVM_CAP_IOEVENTFD, "notifications without an exit"),
    "coalesced-pio": (abi.KVM_CAP_COALESCED_PIO, "fewer exits for console output"),
    "signal-msi": (abi.KVM_CAP_SIGNAL_MSI, "message-signalled interrupts"),
    "tsc-deadline": (abi.KVM_CAP_TSC_DEADLINE_TIMER, "the guest's precise timer"),
    "xsave2": (abi.KVM_CAP_XSAVE2, "saving large vector state"),
}
_REQUIRED = {"irqchip", "pit2", "user-memory", "readonly-mem", "immediate-exit"}

_DEVICES = {
    "tun": ("/dev/net/tun", "networks with taps", "modprobe tun"),
    "vhost-net": ("/dev/vhost-net", "networks at the kernel's speed", "modprobe vhost_net"),
}

_CPUINFO, _KVM_AMD = Path("/proc/cpuinfo"), Path("/sys/module/kvm_amd/parameters")
_ENCRYPTION = {"sev": "sev", "sev_es": "seves"}
"""The processor's flags, which are KVM's parameters too, and vm.conf's words."""

_PROGRAMS = {
    "passt": ("networks without root", "apt install passt"),
    "nft": ("NAT, forwarded ports and locked addresses", "apt install nftables"),
}
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/etc/apparmor.d")
_SWTPM = "usr.bin.swtpm"
_TPM_STATE = "/var/lib/vmd/tpm"
_DAEMON_USER = "_vmd"
_GUEST_MEMORY = 512 << 20

_FIRMWARE = {
    "seabios": (
        BIOS,
        "boot from disks and CD-ROMs",
        "apt install seabios",
    ),
    "ovmf": (
        UEFI,
        "boot UEFI guests",
        "apt install ovmf",
    ),
}


def doctor(_words: Sequence[str] = (), *, as_json: bool = False) -> int:
    """Print the report; returns the exit status."""
    findings = list(_kvm())
    findings.append(_nested())
    findings += [_device(name, *what) for name, what in _DEVICES.items()]
    findings.append(encryption())
    findings += [_firmware(name, *what) for name, what in _FIRMWARE.items()]
    findings += [_program(name, *what) for name, what in _PROGRAMS.items()]
    findings.append(swtpm())
    findings += [_user(), _daemon(), _memory()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    elif sys.stdout.isatty():
        _print_table(findings)
    else:
        for finding in findings:
            hint = f" ({finding.hint})" if finding.hint else ""
            print(f"{finding.check:16} {finding.status:8} {printable(finding.detail + hint)}")
    return 1 if any(f.status is Status.MISSING for f in findings) else 0


def _print_table(findings: list[Finding]) -> None:
    from vmctl.screen.table import show_table  # noqa: PLC0415 - only people see it

    header = ("CHECK", "STATUS", "DETAIL")
    rows = []
    for finding in findings:
        hint = f" ({finding.hint})" if finding.hint else ""
        rows.append((finding.check, finding.status.value, finding.detail + hint))
    show_table(header, rows)


def _kvm() -> Iterator[Finding]:
    with ExitStack() as stack:
        try:
            kvm = stack.enter_context(Kvm())
        except VmmError as err:
            what, _, hint = str(err).partition(" (")
            yield Finding("kvm", Status.MISSING, what, hint.rstrip(")"))
            return
        vcpus = kvm.check_extension(abi.KVM_CAP_MAX_VCPUS)
        yield Finding("kvm", Status.OK, f"/dev/kvm, API {kvm.api_version}, up to {vcpus} vCPUs")
        yield _speed(kvm)
        for name, (capability, use) in _CAPABILITIES.items():
            if kvm.check_extension(capability):
                yield Finding(name, Status.OK, use)
            else:
                missing = Status.MISSING if name in _REQUIRED else Status.LIMITED
                yield Finding(name, missing, f"{use}: not offered", "a newer kernel has it")
        yield from _vms(kvm)


def _vms(kvm: Kvm) -> Iterator[Finding]:
    """Yield a line for each program that runs VMs here, as far as this user may see it."""
    with Vmm(kvm) as vmm:
        for vm in primitives.info(vmm):
            memory = f"{fmt_scaled(vm.used_size)} of {fmt_scaled(vm.memory_size)} of memory"
            text = f"{vm.name}, process {vm.pid}: {vm.ncpus} vCPUs, {memory}"
            yield Finding("vm", Status.OK, text)


def _speed(kvm: Kvm) -> Finding:
    try:
        speed = guest_speed(kvm)
    except VmmError as err:
        return Finding("guests", Status.MISSING, f"cannot run one: {err}", "see the kernel's log")
    text = f"{speed / 1e6:.1f} million instructions a second"
    if speed >= _HARDWARE_SPEED:
        return Finding("guests", Status.OK, f"run in hardware, {text}")
    return Finding(
        "guests",
        Status.LIMITED,
        f"emulated, {text}",
        "enough for the self-test guest; Linux needs hardware virtualisation or the rig",
    )


def _nested() -> Finding:
    flags = _read(Path("/proc/cpuinfo"))
    if "hypervisor" not in flags.split():
        return Finding("nested", Status.OK, "no: this host is a real machine")
    for module in ("kvm_amd", "kvm_intel"):
        allowed = _read(Path(f"/sys/module/{module}/parameters/nested"))
        if allowed.strip() in {"1", "Y"}:
            return Finding("nested", Status.OK, f"yes: a VM itself; {module} nests further")
    return Finding("nested", Status.OK, "yes: this host is a VM itself")


def _device(name: str, path: str, use: str, remedy: str) -> Finding:
    try:
        with Path(path).open("rb+", buffering=0):
            return Finding(name, Status.OK, f"{path}: {use}")
    except OSError as err:
        hint = remedy if isinstance(err, FileNotFoundError) else "run as root, or join its group"
        return Finding(name, Status.LIMITED, f"{path}: {err.strerror}; needed for {use}", hint)


def encryption(
    cpuinfo: Path = _CPUINFO, parameters: Path = _KVM_AMD, device: str = DEVICE
) -> Finding:
    """Tell whether memory can be encrypted; few need it, so that its absence is no fault."""
    flags = set(_read(cpuinfo).split())
    offered = [word for flag, word in _ENCRYPTION.items() if flag in flags]
    if not offered:
        return Finding("encryption", Status.OK, "no: the processor has no AMD SEV")
    able = [
        word
        for flag, word in _ENCRYPTION.items()
        if flag in flags and _read(parameters / flag).strip() in {"1", "Y"}
    ]
    if not able:
        text = f"the processor has {', '.join(offered)}, but KVM does not use it"
        hint = "load kvm_amd with sev=1 sev_es=1, and enable SEV in the firmware"
        return Finding("encryption", Status.LIMITED, text, hint)
    try:
        with open(device, "rb", buffering=0) as opened:  # noqa: PTH123 - a device
            found = platform(opened.fileno())
    except OSError as err:
        hint = "run as root" if isinstance(err, PermissionError) else "modprobe ccp"
        return Finding("encryption", Status.LIMITED, f"{device}: {err.strerror}", hint)
    text = f"{device}: {', '.join(able)}; PSP api {found.major}.{found.minor}, build {found.build}"
    return Finding("encryption", Status.OK, f"{text}; never tried on such a processor")


def _firmware(name: str, wanted: str, use: str, remedy: str) -> Finding:
    try:
        path = find_firmware(wanted).code
    except BootError:
        return Finding(name, Status.LIMITED, f"not found; needed to {use}", remedy)
    return Finding(name, Status.OK, f"{path}: {use}")


def _program(name: str, use: str, remedy: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding(name, Status.LIMITED, f"not found; needed for {use}", remedy)
    return Finding(name, Status.OK, f"{path}: {use}")


def swtpm(enabled: Path = _APPARMOR, profiles: Path = _PROFILES) -> Finding:
    """Tell whether VMs can have a TPM, and whether AppArmor lets vmd's swtpm at its secrets."""
    found = _program("swtpm", "TPMs of VMs", "apt install swtpm")
    if found.status is not Status.OK or _read(enabled).strip() != "Y":
        return found
    if not (profiles / _SWTPM).exists() or _TPM_STATE in _read(profiles / "local" / _SWTPM):
        return found
    hint = f"put 'owner {_TPM_STATE}/** rwk,' into {profiles}/local/{_SWTPM}, and reload it"
    text = f"{found.detail}: AppArmor keeps it out of {_TPM_STATE}"
    return Finding("swtpm", Status.LIMITED, text, hint)


def _user() -> Finding:
    use = "what runs the processes of a vmd that root starts"
    try:
        uid = pwd.getpwnam(_DAEMON_USER).pw_uid
    except KeyError:
        hint = f"useradd --system {_DAEMON_USER}; vmd --user needs none"
        return Finding("user", Status.LIMITED, f"no user {_DAEMON_USER}: {use}", hint)
    return Finding("user", Status.OK, f"{_DAEMON_USER}, uid {uid}: {use}")


def _daemon() -> Finding:
    try:
        with Client():
            path = client_socket(os.environ)
            return Finding("vmd", Status.OK, f"listens at {path}: {may_connect(path)}")
    except CommandError as err:
        # The missing thing and, if known, its remedy.
        problem, _, advice = str(err).partition("\n")
        return Finding("vmd", Status.LIMITED, problem, advice)


def _memory() -> Finding:
    found = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines())
    sizes = {name: int(text.split()[0]) << 10 for name, text in found.items() if text.split()}
    available, total = sizes.get("MemAvailable"), sizes.get("MemTotal")
    if available is None or total is None:
        return Finding("memory", Status.LIMITED, "/proc/meminfo does not say how much there is")
    text = f"{fmt_scaled(available)} of {fmt_scaled(total)} available"
    if available < _GUEST_MEMORY:
        return Finding("memory", Status.LIMITED, text, "less than a VM has by default")
    return Finding("memory", Status.OK, text)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
