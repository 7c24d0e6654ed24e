"""`vmctl run`: a VM in the foreground, without a daemon.

Exit status: 0 the guest powered off (or rebooted, with --no-reboot); 1 an error or a crash of the
guest; 124 time-out; 143 killed by a second SIGTERM; and the status that the guest chose, an odd
number, when it wrote to isa-debug-exit. Reboot restarts the guest in the same process.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from vmctl.foreground.endings import EXIT_ERROR, EXIT_KILLED, Ended, reason_of, status_of
from vmctl.foreground.faults import told
from vmctl.foreground.stdio import Stdio
from vmctl.messages import CONSOLE_CONDITION, choice, fail
from vmctl.report import EXIT_TIMEOUT, Report
from vmctl.values import VmOptions, cpus_of, memory_of, once, seconds_of
from vmm_kvm import log
from vmm_kvm.arch.x86.image import open_firmware, open_image
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import HaltError, SpecError, VmmError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.limits import NAME_MAX
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import (
    BASIC_DEVICES,
    Ending,
    MachineSpec,
    Outcome,
    TripleFault,
)
from vmm_kvm.primitives import Vmm
from vmm_kvm.standard_streams import OutputError

if TYPE_CHECKING:  # loaded if there is a disk, or an interface
    from vmctl.foreground.restoring import Saved
    from vmctl.foreground.vsock import VsockOption
    from vmm_kvm.gdb.server import GdbServer
    from vmm_kvm.machine.net import NetSpec
    from vmm_kvm.machine.spec import DeviceSpec
    from vmm_kvm.net.host_stream import HostStream
    from vmm_kvm.swtpm import Swtpm

_MEMORY = "512M"

# vmd(8)'s limit of restarts: the third in a row so soon after its start is the last.
_EARLY_NS = 6 * NANOSECONDS
_EARLY_CRASHES = _EARLY_RESETS = 3
_RESETS = (
    "vmctl: the guest resets again and again, soon after each start:"
    " --no-reboot ends the run at a reset"
)
_RETRY_NS = NANOSECONDS


class RunOptions(VmOptions):
    """The command line of `vmctl run`, as typed."""

    name: str = ""
    nvram: tuple[str, ...] = ()
    virtio_console: bool = False
    tpm: tuple[str, ...] = ()
    gdb: tuple[str, ...] = ()
    is_writable: bool = False
    """For a command, which is no option."""
    no_reboot: bool = False
    console_log: tuple[str, ...] = ()
    as_json: bool = False


def run(words: Sequence[str] = (), **given: bool | int | str | tuple[str, ...]) -> int:
    """Run one VM until it ends; returns the exit status. Errors are one line on stderr.

    Args:
        words: the VM's name, or nothing.
        given: fields of RunOptions; a `command` runs in a VM of this host's root instead.
    """
    command = given.pop("command", ())
    if isinstance(command, tuple) and command:
        from vmctl.foreground.run_command import run_command  # noqa: PLC0415 - few VMs are for one

        return run_command("".join(words), command, given, run)
    options = RunOptions(**given, name="".join(words))  # type: ignore[arg-type] # as the table has it
    log.set_up_with(_set_up_logging)
    report = Report(options.as_json)
    reason = None
    has_lost_output = False
    try:
        if options.is_writable:
            raise SpecError("--rw is for a command, which follows --")
        with ExitStack() as stack:
            origin = _origin(options)
            vsock = _vsock(options)
            spec = None if origin else _spec(options, vsock, stack)
            limits = _limits(options)
            install_kick_signal()
            vmm = stack.enter_context(Vmm(stack.enter_context(Kvm())))
            saved = None
            if origin:
                from vmctl.foreground.restoring import open_saved  # noqa: PLC0415 - few VMs are restored

                saved = open_saved(origin, options.name, vmm.kvm, stack, vsock)
                spec = saved.spec
            assert spec is not None
            loop = stack.enter_context(EventLoop())
            reboots = not options.no_reboot
            console_log = _open_log(once(options.console_log, "console log"), stack)
            foreground = Foreground(
                vmm, loop, spec, reboots, limits, saved=saved, console_log=console_log
            )
            if vsock:
                from vmctl.foreground.vsock import VsockListener  # noqa: PLC0415 - few VMs have one

                listener = VsockListener(vsock.path, loop, foreground.connect)
                stack.callback(listener.close)
            if options.gdb:
                from vmctl.foreground.gdb_socket import open_server  # noqa: PLC0415 - few VMs are debugged

                server = open_server(options.gdb, loop, foreground.quit, stack)
                foreground.serve_debuggers(server)
            status, message, reason = foreground.run()
            has_lost_output = foreground.has_lost_output
            if options.as_json and foreground.leaves_line_open:
                os.write(1, b"\n")
    except (VmmError, OSError) as err:
        status, message = EXIT_ERROR, told(err)
    if message:
        fail(message)
    try:
        report.end(status, message or reason or "", pid=os.getpid())
    except OutputError as err:  # which changes no status
        if not has_lost_output and isinstance(err.__cause__, OSError):
            fail(f"standard output: {err.__cause__.strerror}")
    return status


def _origin(options: RunOptions) -> str | None:
    """Return the snapshot to continue from, which describes the whole VM."""
    origin = once(options.origin, "snapshot")
    about = (
        *("name", "origin", "timeout", "until", "no_reboot", "as_json", "console_log", "console"),
        *("vsock", "gdb"),
    )
    if origin and any(value for field, value in vars(options).items() if field not in about):
        raise SpecError("--from says all of the VM: use no options that say what it is")
    return origin


def _open_log(path: str | None, stack: ExitStack) -> int | None:
    """Open the file of --console-log, empty; `stack` closes it."""
    if path is None:
        return None
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as err:
        raise SpecError(f"{path}: {err.strerror}") from err
    stack.callback(os.close, fd)
    return fd


def _set_up_logging() -> None:
    # Nothing changes if -v has set it up to log everything.
    log.show_lines("vmctl", "WARNING")


def _spec(options: RunOptions, vsock: "VsockOption | None", stack: ExitStack) -> MachineSpec:
    """Check the options and open their files; `stack` closes them."""
    path, template = _boot_paths(options)
    nvram = once(options.nvram, "nvram")
    if nvram is not None and template is None:
        raise SpecError(f"--nvram is for UEFI firmware, not for {path}")
    variables = None
    if template is not None:
        from vmm_kvm.boot.nvram import open_variables  # noqa: PLC0415 - for UEFI guests only

        variables = stack.enter_context(open_variables(template, nvram))
    name = options.name or _name_of(path)
    devices = (
        *_nics(options, name, stack),
        *_media(options, name, stack),
        *_others(options, stack),
        *((vsock.spec(),) if vsock else ()),
    )
    return MachineSpec(
        image=open_image(path) if options.boot else open_firmware(path),
        variables=variables,
        memory_size=memory_of(once(options.memory, "memory") or _MEMORY),
        cpus=cpus_of(once(options.cpus, "cpus") or "1"),
        devices=(*BASIC_DEVICES, *devices),
        boot_device=_boot_device(once(options.boot_device, "boot device")),
        name=name,
        command_line=once(options.append, "append"),
        initrd=options.initrd,
        tpm=_tpm(options, stack),
    )


def _name_of(path: str) -> str:
    """Return the name of a VM that boots `path` and has none of its own."""
    return os.fsdecode(os.fsencode(os.path.basename(path))[:NAME_MAX])


def _media(options: RunOptions, name: str, stack: ExitStack) -> "Iterator[DeviceSpec]":
    """Open the disks, and the CD-ROM drive's image."""
    disks, cdrom = options.disks, once(options.cdrom, "iso image")
    if options.cloud_init or options.ssh_keys or options.agent:
        from vmctl.images.seed import seed_image  # noqa: PLC0415 - few VMs have one
        from vmm_kvm.memfd import make_constant  # noqa: PLC0415 - the same

        try:
            seed = make_constant("seed", (seed_image(name, options),))
        except OSError as err:
            raise SpecError(f"no memory for a seed: {err.strerror}") from err
        stack.callback(os.close, seed)
        disks = (*disks, f"raw:/proc/self/fd/{seed},ro")
    if not disks and cdrom is None:
        return
    from vmctl.foreground.disks import (  # noqa: PLC0415 - not every VM has a disk
        open_cdrom,
        open_disk,
        refuse_twice,
    )

    refuse_twice(disks)
    for index, text in enumerate(disks):
        yield open_disk(text, index, stack)
    if cdrom is not None:
        yield open_cdrom(cdrom, stack)


def _others(options: RunOptions, stack: ExitStack) -> "Iterator[DeviceSpec]":
    if options.shares:
        from vmctl.foreground.shares import open_shares  # noqa: PLC0415 - few VMs have one

        yield from open_shares(options.shares, stack)
    if options.virtio_console or options.balloon or options.watchdog:
        from vmctl.foreground.own_devices import own_devices  # noqa: PLC0415 - the same

        yield from own_devices(options.virtio_console, options.balloon, options.watchdog)


def _tpm(options: RunOptions, stack: ExitStack) -> "Swtpm | None":
    path = once(options.tpm, "tpm")
    if path is None:
        return None
    from vmctl.foreground.tpm import start_swtpm  # noqa: PLC0415 - few VMs have one

    return start_swtpm(path, stack)


def _vsock(options: RunOptions) -> "VsockOption | None":
    text = once(options.vsock, "vsock")
    if text is None:
        return None
    from vmctl.foreground.vsock import read_option  # noqa: PLC0415 - few VMs have one

    return read_option(text)


def _nics(options: RunOptions, vm: str, stack: ExitStack) -> "tuple[NetSpec, ...]":
    """Open what -i, -n and -L ask for."""
    if not (options.interfaces or options.switches or options.local or options.forwards):
        return ()
    from vmctl.foreground.nic_options import read_nics  # noqa: PLC0415 - not every VM has a network
    from vmctl.foreground.nics import open_nic  # noqa: PLC0415 - the same

    wanted = read_nics(options.interfaces, options.switches, options.local, options.forwards)
    return tuple(open_nic(nic, index, vm, stack) for index, nic in enumerate(wanted))


def _boot_paths(options: RunOptions) -> tuple[str, str | None]:
    """Return the boot image: the named one, or firmware if there are media.

    The second path is where the variables of UEFI firmware begin.
    """
    boot, firmware = once(options.boot, "boot image"), once(options.firmware, "firmware")
    named = [
        name
        for name, is_named in (
            ("--selftest", options.selftest),
            ("-b", boot is not None),
            ("--firmware", firmware is not None),
        )
        if is_named
    ]
    if len(named) > 1:
        raise SpecError(f"{named[0]} and {named[1]} name two boot images: use one")
    if boot is not None:
        return boot, None
    from vmm_kvm.boot.firmware import (  # noqa: PLC0415 - not for kernels
        BIOS,
        KNOWN,
        find_firmware,
        selftest_path,
    )

    if options.selftest:
        return selftest_path(), None
    if firmware is None and not options.disks and not options.cdrom:
        raise SpecError("no kernel or disk/cdrom specified: use -b, -d, -r or --selftest")
    wanted = firmware or BIOS
    if wanted not in KNOWN and "/" not in wanted and not os.path.exists(wanted):
        known = choice((*KNOWN, "the path of an image"))
        raise SpecError(f"unknown firmware {wanted}: No such file or directory ({known})")
    return find_firmware(wanted)


def _boot_device(text: str | None) -> BootDevice:
    if text is None:
        return BootDevice.AUTO
    if text == BootDevice.AUTO.value or text not in {device.value for device in BootDevice}:
        devices = [device.value for device in BootDevice if device is not BootDevice.AUTO]
        raise SpecError(f"unknown boot device {text} ({choice(devices)})")
    return BootDevice(text)


class _Limits(NamedTuple):
    """The outside reason for a VM's end, if any."""

    timeout_s: float | None
    wanted: bytes
    """A text on the console."""


def _limits(options: RunOptions) -> _Limits:
    timeout, until = once(options.timeout, "time-out"), once(options.until, "condition")
    is_text = until and until.startswith(CONSOLE_CONDITION) and until != CONSOLE_CONDITION
    if until is not None and not is_text:
        known = f"{CONSOLE_CONDITION}text: the VM runs from the beginning to the end of run"
        raise SpecError(f"invalid condition: {until} ({known})")
    return _Limits(
        None if timeout is None else seconds_of(timeout),
        os.fsencode((until or "").removeprefix(CONSOLE_CONDITION)),
    )


class Foreground:
    """One VM on this process's standard input and output, over any number of reboots.

    Everything but `_ended` runs on the loop's thread.
    """

    def __init__(
        self,
        vmm: Vmm,
        loop: EventLoop,
        spec: MachineSpec,
        reboot: bool,
        limits: _Limits,
        *,
        saved: "Saved | None",
        console_log: int | None,
    ) -> None:
        """Prepare; `run` makes the machine. The first one continues from `saved`, if any."""
        self._vmm = vmm
        self._loop = loop
        self._spec = spec
        self._saved = saved
        self._reboot = reboot
        self._timeout_s = limits.timeout_s
        self._wanted = limits.wanted
        self._seen = b""
        self._machine: Machine | None = None
        self._gdb: GdbServer | None = None
        self._outcome: Outcome | Ended | None = None
        self._terminations = 0
        self._halt: HaltError | None = None
        self._told_halt = ""
        self._is_throttled = False
        self._retry_timer = loop.timer(self._retry)
        self._stdio = Stdio(loop, self, log=console_log)

    def serve_debuggers(self, server: "GdbServer") -> None:
        """Show every machine of the VM to `server`; before `run`."""
        self._gdb = server

    def run(self) -> tuple[int, str | None, str | None]:
        """Run the VM; returns the exit status, and a message for stderr or else the reason."""
        with ExitStack() as stack:
            machine = stack.enter_context(self._new_machine())
            # From here on the terminal is raw, and must be restored in any case.
            stack.callback(self._stdio.finish, discard=False)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, self._terminate))
            if any(spec.kind == "console" for spec in self._spec.devices):
                resized = signal.signal(signal.SIGWINCH, self._resize)
                stack.callback(signal.signal, signal.SIGWINCH, resized)
            if self._timeout_s is not None:
                timer = self._loop.timer(self._time_out)
                timer.arm(self._loop.monotonic_ns() + int(self._timeout_s * NANOSECONDS))
            self._stdio.start()
            crashes = resets = 0
            while True:
                started_ns = self._loop.monotonic_ns()
                machine.start()
                if self._saved:
                    machine.resume()
                    self._saved = None
                self._loop.run()
                machine.close()
                outcome = self._outcome
                is_reset = outcome is Ending.REBOOT or isinstance(outcome, TripleFault)
                if not self._reboot or not is_reset:
                    break
                is_early = self._loop.monotonic_ns() - started_ns < _EARLY_NS
                crashes = crashes + 1 if is_early and isinstance(outcome, TripleFault) else 0
                if crashes == _EARLY_CRASHES:
                    break
                resets = resets + 1 if is_early else 0
                if resets == _EARLY_RESETS:
                    self._stdio.tell(_RESETS)
                self._outcome = None
                from vmctl.foreground.own_devices import (  # noqa: PLC0415 - few VMs are reset
                    with_timeout,
                )

                devices = with_timeout(self._spec.devices, machine.has_timed_out)
                self._spec = self._spec.but(devices=devices)
                machine = stack.enter_context(self._new_machine())
            self._stdio.finish(discard=isinstance(outcome, Ended) and outcome.discard_output)
        status, message = status_of(self._outcome)
        return status, message, reason_of(self._outcome)

    @property
    def leaves_line_open(self) -> bool:
        """Whether the console's output does not end with a line's end, on anything but a terminal.

        There it always ends.
        """
        return self._stdio.leaves_line_open

    @property
    def has_lost_output(self) -> bool:
        """Whether standard output could not be written, which has been reported."""
        return self._stdio.is_closed

    def _resize(self, _number: int, _frame: FrameType | None) -> None:
        """Tell the guest of the terminal's new size; a signal handler."""
        self._loop.call_soon(self._tell_size)

    def _tell_size(self) -> None:
        if self._machine:
            with suppress(OSError):  # not a terminal
                self._machine.resize_console(*os.get_terminal_size(0))

    def _new_machine(self) -> Machine:
        self._machine = Machine(
            self._spec,
            self._vmm,
            self._loop,
            transmit=self._looking if self._wanted else self._stdio.transmit,
            on_receive_room=lambda: self._loop.call_soon(self._stdio.feed),
            on_outcome=self._ended,
            on_halt=lambda err: self._loop.call_soon(lambda: self._stand_still(err)),
            is_restored=self._saved is not None,
            memory=self._saved.memory if self._saved else None,
        )
        if self._saved:
            from vmm_kvm.machine.state import restore  # noqa: PLC0415 - few VMs are restored

            try:
                restore(self._machine, self._saved.state)
                self._machine.become_another()  # it may be run any number of times
            except BaseException:
                self._machine.close()
                raise
        self._halt = None
        if self._is_throttled:  # the machine before the reboot has unread output
            self._machine.throttle(True)
        self._tell_size()
        if self._gdb:
            self._gdb.attach(self._machine)
        return self._machine

    def connect(self, stream: "HostStream", port: int) -> None:
        """Connect a client to a port of the guest; takes over `stream`."""
        vsock = self._machine.vsock if self._machine else None
        if vsock:
            vsock.connect(stream, port)
        else:
            stream.close()

    # A host that cannot serve a disk's request

    def _stand_still(self, err: HaltError) -> None:
        """Pause, and repeat a disk's request until the host can execute it."""
        if self._halt or self._outcome or not self._machine:
            return
        self._halt = err
        self._machine.pause()
        if str(err) != self._told_halt:
            self._told_halt = str(err)
            self._stdio.tell(f"vmctl: {err}: paused until it succeeds")
        self._retry_timer.arm(self._loop.monotonic_ns() + _RETRY_NS)

    def _retry(self) -> None:
        if self._halt and self._machine:
            self._halt = None
            self._machine.resume()

    # Ways to end

    def _looking(self, data: bytes) -> None:
        """Pass on the guest's output, and look for the awaited text; any thread."""
        self._stdio.transmit(data)
        seen = self._seen + data
        if self._wanted in seen:
            self._loop.call_soon(lambda: self._finish(Ended(0, reason="found")))
        self._seen = seen[-len(self._wanted) :]

    def _ended(self, outcome: Outcome) -> None:
        """Record the guest's action; called on any thread."""
        self._loop.call_soon(lambda: self._finish(outcome))

    def _finish(self, outcome: Outcome | Ended) -> None:
        if self._outcome is None:
            self._outcome = outcome
        self._loop.stop()

    def _time_out(self) -> None:
        self._finish(Ended(EXIT_TIMEOUT, f"timed out after {self._timeout_s:g} s"))

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        """Press the power button at the first signal, kill at the second; a signal handler."""
        self._terminations += 1
        if self._terminations == 1:
            self._loop.call_soon(self._press_power_button)
        else:
            ended = Ended(EXIT_KILLED, "killed by a second signal", discard_output=True)
            self._loop.call_soon(lambda: self._finish(ended))

    def _press_power_button(self) -> None:
        if self._machine:
            self._machine.press_power_button()

    # The console's requests (vmctl.foreground.stdio.Guest)

    def receive(self, data: bytes) -> int:
        """Give input to the guest's console; returns how many bytes it took."""
        return self._machine.receive(data) if self._machine else 0

    def receive_break(self) -> None:
        """Send a BREAK to the serial port."""
        if self._machine:
            self._machine.uart.receive_break()

    def throttle(self, hold: bool) -> None:
        """Hold the vCPUs while output waits for its reader, or release them."""
        self._is_throttled = hold
        if self._machine:
            self._machine.throttle(hold)

    def quit(self, reason: str | None) -> None:
        """End the VM: the user typed `~.`, or the console went away."""
        self._finish(Ended(0 if reason is None else EXIT_ERROR, reason))
