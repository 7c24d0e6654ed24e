"""Rules for a VM and its options. Those that OpenBSD does not have say so.

Words that OpenBSD lacks are keywords only where a VM's options stand: a vm.conf of OpenBSD that
uses one as a name keeps its meaning.

Source: sections 4.2 and 4.5 of OpenBSD's behaviour.
"""

from vmd.config.disks import OPTIONS_WITH_VALUE, DiskError, DiskKind, DiskOption, with_option
from vmd.config.grammar import Tokens
from vmd.config.host import Host
from vmd.config.interfaces import InterfaceRule
from vmd.config.model import (
    AFTER_MAX,
    PATH_BYTES_MAX,
    STOP_TIMEOUT_MAX_S,
    InterfaceConfig,
    Right,
    VmConfig,
)
from vmd.config.seeds import SSH_KEYS_MAX, SeedOption
from vmd.config.shares import (
    ACCESS,
    VHOST_USER,
    ShareError,
    ShareOption,
    check_tag,
    check_tags,
)
from vmd.config.values import ValueRefusedError, byte_length, memory_of
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.limits import DISKS_MAX, INTERFACES_MAX, NAME_MAX, SHARES_MAX, VCPUS_MAX

FORMATS = tuple(DiskKind(name) for name in ("raw", "qcow2", "pmem", "vhost-user"))
"""Formats of disks. The first two are OpenBSD's."""
DISK_OPTIONS = ("ro", "serial", "queues", "error", "private", "snapshot")
"""Words of the block of a disk, which OpenBSD does not have."""
SHARE_OPTIONS = ("tag", *ACCESS)
"""Words of a shared directory."""
SNAPSHOT = "snapshot"
"""Words of `allow` that are ours."""
OWN_OPTIONS = (
    *("after", "append", "balloon", "cloud-init", "cpus", "firmware", "initrd", "limit", "share"),
    *("ssh", "stop", "tpm", "vsock", "watchdog"),
)
"""Options of a VM that OpenBSD does not have."""
FIRMWARE_NAMES = ("bios", "uefi")
CPU_LIMIT_MAX = 100 * VCPUS_MAX
"""Percent."""
_RIGHTS = (
    *(Right.BOOT, Right.MEMORY, Right.INTERFACE, Right.DISK, Right.CDROM),
    Right.INSTANCE,
)
_OWN_RIGHTS = (Right.SHARE,)
_BOOT_DEVICES = (BootDevice.CDROM, BootDevice.DISK, BootDevice.NET)


class VmRule:
    """`vm = "vm" string [ "instance" string ] block of vmopt`."""

    def __init__(self, tokens: Tokens, host: Host, *, skips_missing: bool = False) -> None:
        """Read from `tokens`; with `skips_missing`, files that are not there go to `missing`."""
        self._tokens = tokens
        self._host = host
        self._skips_missing = skips_missing
        self.missing: list[str] = []
        """A line for each file that is not there."""
        self._vm = VmConfig("")
        self._interface_count = 0

    def parse(self) -> VmConfig:
        """Take a VM."""
        tokens = self._tokens
        tokens.expect("vm")
        name, parent = tokens.string(), None
        if tokens.accept("instance"):
            name, parent = tokens.string(), name
            if byte_length(parent) > NAME_MAX:
                tokens.refuse(f"vm {parent} name too long")
        if byte_length(name) > NAME_MAX:
            tokens.refuse("vm name too long")
        self._vm = VmConfig(name, parent)
        if parent is not None:
            self._give(Right.INSTANCE)
        tokens.block(self._option)
        vm = self._vm
        missing = self._interface_count - len(vm.interfaces)
        return vm._replace(
            interfaces=vm.interfaces + (InterfaceConfig(),) * missing, where=tokens.where
        )

    def _give(self, right: Right) -> None:
        self._vm = self._vm._replace(given=self._vm.given | {right})

    def _option(self) -> None:
        """Take an option of a VM.

        vmopt = "enable" | "disable" | "sev" | "seves" | disk | [ "local" ] "interface" ... | boot
              | "cdrom" string | "interfaces" NUMBER | memory | "owner" owner | allow
              | "cpus" NUMBER | "limit" "cpu" STRING
              | "initrd" string | "append" string | "firmware" string
              | "after" string | "stop" "timeout" NUMBER | "vsock" | "balloon"
              | "watchdog" | "tpm" | share | "cloud-init" string | "ssh" "key" string
        """
        tokens = self._tokens
        if tokens.accept("enable"):
            self._vm = self._vm._replace(is_enabled=True)
        elif tokens.accept("disable"):
            self._vm = self._vm._replace(is_enabled=False)
        elif tokens.accept("sev"):
            self._vm = self._vm._replace(is_sev=True)
        elif tokens.accept("seves"):
            self._vm = self._vm._replace(is_sev=True, is_sev_es=True)
        elif tokens.accept("disk"):
            self._disk()
        elif tokens.is_at("local") or tokens.is_at("interface"):
            self._interface()
        elif tokens.accept("boot"):
            self._boot()
        elif tokens.accept("cdrom"):
            self._cdrom()
        elif tokens.accept("interfaces"):
            self._interfaces()
        elif tokens.accept("memory"):
            self._memory()
        elif tokens.accept("owner"):
            self._vm = self._vm._replace(owner=tokens.owner(self._host))
        elif tokens.accept("allow"):
            self._allow()
        else:
            self._own_option()

    def _own_option(self) -> None:
        tokens = self._tokens
        word = next((each for each in OWN_OPTIONS if tokens.is_at_own(each)), None)
        if word is None:
            tokens.syntax_error()
        tokens.take()
        match word:
            case "cpus":
                self._cpus()
            case "limit":
                self._limit()
            case "initrd":
                path = self._resolved(tokens.string(), "initrd")
                self._vm = self._vm._replace(initrd=(*self._vm.initrd, path))
                self._give(Right.BOOT)
            case "append":
                text = tokens.string()
                if self._vm.append is not None:
                    tokens.refuse("append specified more than once")
                self._vm = self._vm._replace(append=text)
                self._give(Right.BOOT)
            case "after":
                self._after()
            case "share":
                self._share()
            case "cloud-init":
                self._cloud_init()
            case "ssh":
                self._ssh_key()
            case "stop":
                self._stop_timeout()
            case "vsock":
                self._vm = self._vm._replace(has_vsock=True)
            case "balloon":
                self._vm = self._vm._replace(has_balloon=True)
            case "watchdog":
                self._vm = self._vm._replace(has_watchdog=True)
            case "tpm":
                self._vm = self._vm._replace(has_tpm=True)
            case _:
                self._firmware()

    def _after(self) -> None:
        tokens, vm = self._tokens, self._vm
        name = tokens.string()
        if byte_length(name) > NAME_MAX:
            tokens.refuse("vm name too long")
        if name in vm.after:
            tokens.refuse(f'after "{name}" specified more than once')
        if len(vm.after) >= AFTER_MAX:
            tokens.refuse(f"more than {AFTER_MAX} VMs to start after")
        self._vm = vm._replace(after=(*vm.after, name))

    def _cloud_init(self) -> None:
        path = self._seed_path("cloud-init")
        seed = self._vm.seed or SeedOption()
        if seed.cloud_init:
            self._tokens.refuse("cloud-init specified more than once")
        self._vm = self._vm._replace(seed=seed._replace(cloud_init=path))
        self._give(Right.DISK)

    def _ssh_key(self) -> None:
        """Take `"key" STRING`, after `"ssh"`."""
        if not self._tokens.is_at_own("key"):
            self._tokens.syntax_error()
        self._tokens.take()
        path = self._seed_path("ssh key")
        seed = self._vm.seed or SeedOption()
        if len(seed.ssh_keys) >= SSH_KEYS_MAX:
            self._tokens.refuse("too many ssh keys")
        self._vm = self._vm._replace(seed=seed._replace(ssh_keys=(*seed.ssh_keys, path)))
        self._give(Right.DISK)

    def _seed_path(self, what: str) -> str:
        path = self._tokens.string()
        resolved = self._host.absolute(path)
        if not path or byte_length(resolved) > PATH_BYTES_MAX:
            self._tokens.refuse(f"{what} path too long" if path else f"{what} without a path")
        return resolved

    def _stop_timeout(self) -> None:
        tokens = self._tokens
        if not tokens.is_at_own("timeout"):
            tokens.syntax_error()
        tokens.take()
        seconds = tokens.number()
        if self._vm.stop_timeout_s is not None:
            tokens.refuse("stop timeout specified more than once")
        if not 1 <= seconds <= STOP_TIMEOUT_MAX_S:
            tokens.refuse(f"stop timeout is 1 to {STOP_TIMEOUT_MAX_S} seconds: {seconds}")
        self._vm = self._vm._replace(stop_timeout_s=seconds)

    def _disk(self) -> None:
        """Take a disk: `"disk" string [ "format" string ] [ loose block of diskopt ]`."""
        tokens = self._tokens
        path, kind = tokens.string(), DiskKind.PROBE
        if tokens.accept("format"):
            word = tokens.string()
            kind = _kind_of(word)
            if kind is DiskKind.PROBE:
                tokens.refuse(f"unrecognized disk format {word}")
        try:
            disk = DiskOption(kind, self._resolved_disk(path))
        except ValueRefusedError as err:
            tokens.refuse_value(str(err), f"failed to parse disks: {path}")
        if tokens.is_at("{"):
            disk = self._disk_block(disk, path)
        self._vm = self._vm._replace(disks=(*self._vm.disks, disk))
        self._give(Right.DISK)

    def _resolved_disk(self, path: str) -> str:
        if len(self._vm.disks) >= DISKS_MAX:
            raise ValueRefusedError("too many disks")
        try:
            resolved = self._host.resolve(path)
        except OSError as err:
            text = f"disk {path}: {err.strerror}"
            if not self._skips_missing:
                raise ValueRefusedError(text) from None
            self.missing.append(f"{self._tokens.where}: {text}")
            return path
        if byte_length(resolved) > PATH_BYTES_MAX:
            raise ValueRefusedError("disk path too long")
        return resolved

    def _disk_block(self, disk: DiskOption, path: str) -> DiskOption:
        """Take options of a disk.

        diskopt = "ro" | "serial" STRING | "queues" NUMBER | "error" STRING | "private" | "snapshot"
        """
        tokens = self._tokens

        def option() -> None:
            nonlocal disk
            word = next((each for each in DISK_OPTIONS if tokens.is_at_own(each)), None)
            if word is None:
                tokens.syntax_error()
            tokens.take()
            value = ""
            if word in OPTIONS_WITH_VALUE:
                value = str(tokens.number()) if word == "queues" else tokens.one_string()
            try:
                disk = with_option(disk, word, value)
            except DiskError as err:
                tokens.refuse_value(str(err), f"failed to parse disks: {path}")

        tokens.loose_block(option)
        return disk

    def _share(self) -> None:
        """Take `STRING [ "tag" STRING ] [ "ro" | "rw" ]`, after `"share"`.

        Without a tag it is the directory's name; without a word for it, the guest only reads.
        """
        tokens = self._tokens
        text = tokens.one_string()
        is_server, tag, access = text.startswith(VHOST_USER), "", ""
        path = text.removeprefix(VHOST_USER)
        if tokens.is_at_own("tag"):
            tokens.take()
            tag = tokens.one_string()
        else:
            tag = path.rstrip("/").rpartition("/")[2]
        if word := next((each for each in ACCESS if tokens.is_at_own(each)), ""):
            tokens.take()
            access = word
        if not path or byte_length(self._host.absolute(path)) > PATH_BYTES_MAX:
            tokens.refuse("share path too long" if path else "share without a path")
        if is_server and access:
            tokens.refuse(f"share {text}: what may be written is up to its server")
        if len(self._vm.shares) >= SHARES_MAX:
            tokens.refuse("too many shares")
        is_read_only = not is_server and ACCESS[access or "ro"]
        share = ShareOption(self._host.absolute(path), tag, is_read_only, is_server)
        shares = (*self._vm.shares, share)
        try:
            check_tag(tag)
            check_tags(shares)
        except ShareError as err:
            tokens.refuse(f"share {text}: {err}")
        self._vm = self._vm._replace(shares=shares)
        self._give(Right.SHARE)

    def _interface(self) -> None:
        rule = InterfaceRule(self._tokens)
        rule.parse()
        count = len(self._vm.interfaces) + 1
        if count > INTERFACES_MAX:
            self._tokens.refuse(f"too many interfaces: {count}")
        self._vm = self._vm._replace(interfaces=(*self._vm.interfaces, rule.named()))
        self._give(Right.INTERFACE)

    def _interfaces(self) -> None:
        number = self._tokens.number()
        if self._interface_count:
            self._tokens.refuse("interfaces specified more than once")
        if not 0 <= number <= INTERFACES_MAX:
            self._tokens.refuse(f"too many interfaces: {number}")
        self._interface_count = number
        self._give(Right.INTERFACE)

    def _boot(self) -> None:
        """Take `"boot" string | "boot" "device" ( "cdrom" | "disk" | "net" )`."""
        tokens = self._tokens
        if tokens.accept("device"):
            device = next((each for each in _BOOT_DEVICES if tokens.accept(each)), None)
            if device is None:
                tokens.syntax_error()
            self._vm = self._vm._replace(boot_device=device)
            return
        path = tokens.string()
        if self._vm.boot is not None:
            tokens.refuse("kernel specified more than once")
        if self._vm.firmware is not None:
            tokens.refuse("boot and firmware specified")
        self._vm = self._vm._replace(boot=self._resolved(path, "kernel"))
        self._give(Right.BOOT)

    def _firmware(self) -> None:
        tokens = self._tokens
        name = tokens.string()
        if self._vm.firmware is not None:
            tokens.refuse("firmware specified more than once")
        if self._vm.boot is not None:
            tokens.refuse("boot and firmware specified")
        if name not in FIRMWARE_NAMES:
            name = self._resolved(name, "firmware")
        self._vm = self._vm._replace(firmware=name)
        self._give(Right.BOOT)

    def _resolved(self, path: str, what: str) -> str:
        try:
            resolved = self._host.resolve(path)
        except OSError as err:
            text = f"{what} path not found: {err.strerror}"
            if what == "firmware" and "/" not in path:
                text += f": use {', '.join(FIRMWARE_NAMES)} or the path of an image"
            if not self._skips_missing:
                self._tokens.refuse(text)
            self.missing.append(f"{self._tokens.where}: {text}")
            return path
        if byte_length(resolved) > PATH_BYTES_MAX:
            self._tokens.refuse(f"{what} name too long")
        return resolved

    def _cdrom(self) -> None:
        tokens = self._tokens
        path = tokens.string()
        if self._vm.cdrom is not None:
            tokens.refuse("cdrom specified more than once")
        if byte_length(path) > PATH_BYTES_MAX:
            tokens.refuse("cdrom name too long")
        self._vm = self._vm._replace(cdrom=self._host.absolute(path) if path else None)
        self._give(Right.CDROM)

    def _memory(self) -> None:
        """Take `"memory" ( NUMBER | STRING )`."""
        tokens = self._tokens
        size: int | str
        if tokens.peek().is_string:
            size, what = tokens.one_string(), "argument"
        else:
            size, what = tokens.number(), "memory"
        if self._vm.memory is not None:
            tokens.refuse(f"{what} specified more than once")
        try:
            memory = memory_of(size)
        except ValueRefusedError as err:
            tokens.refuse_value(str(err), f"failed to parse size: {size}")
        self._vm = self._vm._replace(memory=memory)
        self._give(Right.MEMORY)

    def _cpus(self) -> None:
        tokens = self._tokens
        count = tokens.number()
        if self._vm.cpus is not None:
            tokens.refuse("cpus specified more than once")
        if not 1 <= count <= VCPUS_MAX:
            tokens.refuse(f"cpu count is too {'small' if count < 1 else 'large'}: {count}")
        self._vm = self._vm._replace(cpus=count)
        self._give(Right.CPUS)

    def _limit(self) -> None:
        """Take `"cpu" STRING`, after `"limit"`: a percentage of one processor, `200%`."""
        tokens = self._tokens
        if not tokens.is_at_own("cpu"):
            tokens.syntax_error()
        tokens.take()
        text = tokens.one_string() if tokens.peek().is_string else str(tokens.number())
        if self._vm.cpu_limit is not None:
            tokens.refuse("limit cpu specified more than once")
        digits = text.removesuffix("%")
        is_percent = digits != text and digits.isascii() and digits.isdecimal()
        if not is_percent or len(digits) > len(str(CPU_LIMIT_MAX)):
            tokens.refuse(f"invalid limit cpu: {text} (a percentage of one processor: 200%)")
        percent = int(digits)
        if not 1 <= percent <= CPU_LIMIT_MAX:
            tokens.refuse(f"invalid limit cpu: {text} (1% to {CPU_LIMIT_MAX}%)")
        self._vm = self._vm._replace(cpu_limit=percent)

    def _allow(self) -> None:
        """Take the parts that instances may replace, or that the owner may make snapshots.

        allow    = "allow" ( "snapshot" | "instance" ( insflag | "{" {NL} insflags "}" ) )
        insflags = insflag { sep insflag } {NL}         sep = "," {NL} | NL {NL}
        """
        tokens = self._tokens
        if tokens.is_at_own(SNAPSHOT):
            tokens.take()
            self._vm = self._vm._replace(allow_snapshot=True)
            return
        tokens.expect("instance")
        if not tokens.accept("{"):
            self._right()
            return
        tokens.newlines()
        self._right()
        while not tokens.accept("}"):
            if not tokens.accept(","):
                tokens.expect("\n")
                tokens.newlines()
                if tokens.accept("}"):
                    return
            tokens.newlines()
            self._right()

    def _right(self) -> None:
        """Take `insflag = "boot" | "memory" | ... | "share" | "owner" owner`."""
        tokens = self._tokens
        if tokens.accept("owner"):
            self._vm = self._vm._replace(instance_owner=tokens.owner(self._host))
            return
        right = next((each for each in _RIGHTS if tokens.accept(each)), None)
        if right is None:
            right = next((each for each in _OWN_RIGHTS if tokens.is_at_own(each)), None)
            if right is None:
                tokens.syntax_error()
            tokens.take()
        self._vm = self._vm._replace(allow_instance=self._vm.allow_instance | {right})


def _kind_of(word: str) -> DiskKind:
    """Return the kind of disk that a format names, in any case of letters; PROBE if none."""
    return next((each for each in FORMATS if each == word.lower()), DiskKind.PROBE)
