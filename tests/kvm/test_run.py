"""`vmctl run` with the self-test guest: its ends, its console, its refusals."""

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import guests
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run

pytestmark = pytest.mark.kvm

READY_S = 30.0
FORWARD = "vmctl: invalid forward: tcp:x: not tcp|udp:[address:]port[:port]"
IN_INTERFACE = "invalid interface: passt,forward=tcp:x: "
TEMPLATE = (
    "vmctl: -t is not for run: there is no daemon that knows a template: give all options here"
)
CONDITION = (
    "vmctl: invalid condition: running (console=text: the VM runs from the beginning to the end of"
    " run)"
)
TWICE = "vmctl: forwarded port tcp 80 comes twice"
MEANT = "512 is a number of bytes: did you mean 512M?"


def selftest(*arguments: str, is_tty: bool = False) -> ConsoleProcess:
    """Start the self-test guest, with a time-out of a minute."""
    return ConsoleProcess(vmctl_run("--selftest", "--timeout", "60", *arguments), is_tty=is_tty)


def refused(*arguments: str) -> str:
    """Run a command that must fail with status 1, one line and no output; returns the line."""
    done = subprocess.run(
        [VMCTL, "run", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr.rstrip("\n")


def test_power_off() -> None:
    """ACPI S5 ends the VM with status 0, after the guest's last line."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0
        assert vm.output.rstrip().endswith(b"p: power off by ACPI S5")
        assert vm.errors == b""


@pytest.mark.parametrize("key", ["r", "k"])
def test_no_reboot_ends(key: str) -> None:
    """With --no-reboot the reset register, and the i8042's reset, end the VM with status 0."""
    with selftest("--no-reboot") as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send(key)
        assert vm.wait() == 0


@pytest.mark.parametrize("key", ["r", "k", "t"])
def test_reboot_in_the_same_process(key: str) -> None:
    """The reset register, the i8042 and a triple fault start the guest again in this process."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send(key)
        vm.expect("self-test guest", READY_S)
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0


def test_the_watchdog_resets_a_guest_that_hangs(tmp_path: Path) -> None:
    """It is told in one line, and --no-reboot ends the VM then."""
    image = tmp_path / "hangs"
    image.write_bytes(guests.firmware(guests.hanging(2)))
    arguments = ("-b", image, "--watchdog", "--no-reboot", "--timeout", "60")
    with ConsoleProcess(vmctl_run(*arguments)) as vm:
        assert vm.wait() == 0
        assert vm.errors == b"vmctl: watchdog: the guest hangs, and is reset\n"


def test_triple_fault_without_reboot() -> None:
    """With --no-reboot a triple fault is status 1 and one line with the important registers."""
    with selftest("--no-reboot") as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("t")
        assert vm.wait() == 1
        line = vm.errors.decode()
        assert line.startswith("vmctl: selftest.bin: triple fault: vcpu0 rip=0x")
        assert line.count("\n") == 1
        assert "cr3=" in line


def test_triple_faults_in_a_row() -> None:
    """A guest that only triple faults is not restarted for ever."""
    with selftest() as vm:
        for _ in range(3):
            vm.expect("selftest: ready", READY_S)
            vm.send("t")
        assert vm.wait() == 1
        assert b"triple fault" in vm.errors
        assert vm.output.count(b"selftest: ready") == 3


def test_resets_in_a_row_are_told_once() -> None:
    """A guest that only resets runs on, and standard error says so once."""
    told = b"vmctl: the guest resets again and again, soon after each start: --no-reboot ends"
    with selftest() as vm:
        for count in range(5):
            vm.expect("selftest: ready", READY_S)
            assert vm.errors.count(told) == (1 if count > 2 else 0)
            vm.send("k")
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0
        assert vm.errors.count(told) == 1


def test_panic() -> None:
    """A panic that the guest reports through pvpanic is status 1 and says so."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("c")
        assert vm.wait() == 1
        assert vm.errors == b"vmctl: selftest.bin: the guest panicked\n"


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x2A, 85), (0xFF, 255)])
def test_debug_exit(value: int, status: int) -> None:
    """A write to isa-debug-exit ends the VM with (value << 1) | 1."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send(b"x" + bytes([value]))
        assert vm.wait() == status
        assert vm.errors == b""


@pytest.mark.parametrize("key", ["s", "h", "n"])
def test_timeout(key: str) -> None:
    """--timeout ends a VM with status 124, also one that spins or halts with interrupts off."""
    with ConsoleProcess(vmctl_run("--selftest", "--timeout", "4")) as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send(key)
        assert vm.wait() == 124
        assert vm.errors == b"vmctl: timed out after 4 s\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_presses_the_power_button(number: signal.Signals) -> None:
    """The guest obeys the power button and powers off: status 0."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.signal(number)
        assert vm.wait() == 0


def test_second_signal_kills() -> None:
    """A guest that spins ignores the power button; the second signal ends it: status 143."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("s")
        vm.expect("spin", READY_S)
        vm.signal(signal.SIGTERM)
        with pytest.raises(AssertionError):
            vm.wait(1)
        vm.signal(signal.SIGTERM)
        assert vm.wait() == 143
        assert vm.errors == b"vmctl: killed by a second signal\n"


def test_several_vcpus() -> None:
    """All vCPUs start, each with another APIC id."""
    with selftest("-p", "4") as vm:
        vm.expect("cpus: 4 of 4 running", READY_S)
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0


@pytest.mark.parametrize(
    ("size", "kib"), [("1M", 1024), ("3M", 3072), ("64M", 65536), ("5G", 5 << 20)]
)
def test_memory_sizes(size: str, kib: int) -> None:
    """The guest sees the configured memory, from 1 MiB to more than 4 GiB."""
    with selftest("-m", size) as vm:
        vm.expect(f"memory: {kib} KiB usable", READY_S)
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0


def test_end_of_input_is_not_the_end() -> None:
    """Input before the end of standard input reaches the guest, which runs on."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("n")
        vm.close_input()
        vm.expect("^2", READY_S)
        vm.signal(signal.SIGTERM)
        assert vm.wait() == 0


def test_closed_output_changes_no_status() -> None:
    """When the reader of standard output is gone the VM runs on: one line, and its own status."""
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.close_output()
        vm.expect_errors("vmctl: standard output: its reader has gone away\n", READY_S)
        vm.send(b"x\x15")
        assert vm.wait() == 43
        assert vm.errors.count(b"\n") == 1


def test_wait_for_a_text() -> None:
    """The VM ends when the console shows the text, even in pieces; status 124 if it never does."""
    words = vmctl_run("--selftest", "--json", "--timeout", "60", "--wait", "console=test: ready")
    done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"selftest: ready" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["reason"] == "found"
    words = vmctl_run("--selftest", "--timeout", "2", "--wait", "console=never")
    done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (124, b"vmctl: timed out after 2 s\n")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ("--selftest", "-m", "512"),
            f"memory size must be at least 1MB\nvmctl: {MEANT}",
        ),
        (
            ("--firmware", "efi"),
            "unknown firmware efi: No such file or directory (bios, uefi or the path of an image)",
        ),
        (("--selftest", "-B", "tape"), "unknown boot device tape (disk, cdrom or net)"),
        (("--selftest", "-d", "disk.img,size=1"), "invalid disk: disk.img,size=1: unknown option"),
        (("--selftest", "-i", "hub"), "invalid interface: hub: unknown kind 'hub' (tap, bridge"),
    ],
)
def test_what_a_newcomer_types(arguments: tuple[str, ...], lines: str) -> None:
    """An error says what is wrong, and what would be right."""
    done = subprocess.run(
        vmctl_run(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"vmctl: {lines}")


@pytest.mark.parametrize(
    ("key", "status", "reason"),
    [("p", 0, "power off"), ("x\x15", 43, "debug exit 21"), ("c", 1, "selftest.bin: the guest ")],
)
def test_json_and_console_log(key: str, status: int, reason: str, tmp_path: Path) -> None:
    """The last line of output is JSON about the end; the log has the console's output."""
    log = tmp_path / "console.log"
    log.write_bytes(b"of a run before" * 1000)
    with selftest("--json", "--console-log", str(log)) as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send(key)
        assert vm.wait() == status
        console, told = vm.output.rstrip(b"\n").rsplit(b"\n", 1)
        fields = json.loads(told)
        assert (fields["pid"], fields["exit"]) == (vm.pid, status)
        assert fields["reason"].startswith(reason)
        assert log.read_bytes().rstrip(b"\n") == console.rstrip(b"\n")


@pytest.mark.parametrize(
    ("redirection", "errors"),
    [
        (">/dev/full", "vmctl: standard output: No space left on device\n"),
        (">&-", "vmctl: standard output: Bad file descriptor\n"),
    ],
)
def test_a_lost_result_changes_no_status(redirection: str, errors: str, tmp_path: Path) -> None:
    """If neither output nor JSON can be written, the status is the guest's, and the log whole."""
    log = tmp_path / "console.log"
    words = vmctl_run("--selftest", "--json", "--timeout", "3", "--console-log", log)
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (124, f"{errors}vmctl: timed out after 3 s\n")
    assert b"selftest: ready" in log.read_bytes()


def test_a_console_log_that_cannot_be_written() -> None:
    """A log that fails causes one line, and the VM runs on; one that cannot be made is refused."""
    with selftest("--console-log", "/dev/full") as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("p")
        assert vm.wait() == 0
        assert vm.errors == b"vmctl: console log: No space left on device\n"
    line = "vmctl: /nonexistent/log: No such file or directory"
    assert refused("--selftest", "--console-log", "/nonexistent/log") == line


def test_long_input_is_not_lost() -> None:
    """More input than any buffer holds is echoed in full: the sender waits for the guest."""
    text = bytes(33 + i % 10 for i in range(3000))
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        start = len(vm.output)
        vm.send(text)
        vm.send("\np")
        assert vm.wait() == 0
        assert text in vm.output[start:].replace(b"\r", b"").replace(b"\n", b"")


def test_input_from_a_file(tmp_path: Path) -> None:
    """A regular file as standard input works, and its end is not the end of the VM."""
    commands = tmp_path / "commands"
    commands.write_bytes(b"hello")
    with commands.open("rb") as stdin:
        done = subprocess.run(
            [VMCTL, "run", "--selftest", "--timeout", "4"],
            stdin=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 124
    assert b"selftest: ready" in done.stdout


def test_output_to_a_file(tmp_path: Path) -> None:
    """A regular file as standard output gets all output."""
    log = tmp_path / "log"
    with log.open("wb") as stdout:
        status = subprocess.run(
            [VMCTL, "run", "--selftest", "--timeout", "3"],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            timeout=60,
            check=False,
        ).returncode
    assert status == 124
    assert b"selftest: ready" in log.read_bytes()


def test_slow_reader_holds_the_guest() -> None:
    """A reader that is slower than the guest loses nothing."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(
        [VMCTL, "run", "--selftest", "--timeout", "60"],
        stdin=subprocess.PIPE,
        stdout=write_fd,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(write_fd)
        assert process.stdin
        output = b""
        while b"selftest: ready" not in output:
            output += os.read(read_fd, 4096)
        process.stdin.write(b"i" * 16)
        process.stdin.write(b"p")
        process.stdin.flush()
        while data := os.read(read_fd, 512):
            output += data
        assert process.wait() == 0
        process.stdin.close()
    os.close(read_fd)
    assert output.count(b"selftest: ready") == 17


def busy_s(pid: int) -> float:
    """Return how much processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_guest_that_reboots_is_held_by_its_reader(tmp_path: Path) -> None:
    """A guest whose output is not read is held, even after a reboot, and loses nothing."""
    text = bytes(number & 0xFF for number in range(10000, 0, -1))
    reset = bytes.fromhex("b0fe e664 ebfe")  # mov $0xfe, %al; out %al, $0x64; jmp .
    image = tmp_path / "image"
    image.write_bytes(guests.firmware(guests.printing(len(text)) + reset))
    command = vmctl_run("-m", "64M", "-b", image, "--timeout", "100")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        try:
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
            deadline, before = time.monotonic() + 60, -1.0
            while busy_s(process.pid) - before > 0.05:
                assert time.monotonic() < deadline
                before = busy_s(process.pid)
                time.sleep(1)
            read = process.stdout.read(150_000)
            assert read == (text * (len(read) // len(text) + 1))[: len(read)]
        finally:
            process.kill()


def test_terminal_escapes() -> None:
    """On a terminal ~. powers off; a ~ elsewhere on the line is the guest's."""
    with selftest(is_tty=True) as vm:
        vm.expect("selftest: ready", READY_S)
        vm.send("a~.")
        vm.expect(r"a~\.", READY_S)
        vm.send("\r~?")
        vm.expect_errors("send a BREAK", READY_S)
        vm.send("~.")
        assert vm.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "vmctl: no kernel or disk/cdrom specified: use -b, -d, -r or --selftest"),
        (
            ("-b", "x", "--firmware", "bios"),
            "vmctl: -b and --firmware name two boot images: use one",
        ),
        (("-r", "/nonexistent.iso"), "vmctl: /nonexistent.iso: No such file or directory"),
        (("--firmware", "/nonexistent"), "vmctl: /nonexistent: No such file or directory"),
        (("-b", "/nonexistent"), "vmctl: /nonexistent: No such file or directory"),
        (("-b", "/"), "vmctl: /: is a directory"),
        (("--selftest", "-b", "x"), "vmctl: --selftest and -b name two boot images: use one"),
        (("--selftest", "-m", "0"), "vmctl: memory size must be at least 1MB"),
        (("--selftest", "-m", "1X"), "vmctl: invalid memory size: 1X: Invalid argument"),
        (("--selftest", "-m", "1T"), "vmctl: memory size too large (limit is 128G)"),
        (("--selftest", "-p", "0"), "vmctl: cpu count is too small: 0"),
        (("--selftest", "-p", "65"), "vmctl: cpu count is too large: 65"),
        (("--selftest", "-p", "two"), "vmctl: cpu count is invalid: two"),
        (("--selftest", "--timeout", "-1"), "vmctl: invalid time-out: -1: not a number of seconds"),
        (("--selftest", "--timeout", "x"), "vmctl: invalid time-out: x: not a number of seconds"),
        (("--selftest", "-m", "1G", "-m", "2G"), "vmctl: memory specified multiple times"),
        (("--selftest", "--forward", "tcp:x"), FORWARD),
        (("--selftest", "-i", "passt,forward=tcp:x"), f"vmctl: {IN_INTERFACE}{FORWARD[7:]}"),
        (("--selftest", "-t", "base"), TEMPLATE),
        (("--selftest", "--wait", "running"), CONDITION),
        (("--selftest", "--wait", "console="), CONDITION.replace("running", "console=", 1)),
        (("--selftest", "--gdb", "x,y"), "vmctl: --gdb: unknown option 'y' (wait)"),
        (("--selftest", "--forward", "tcp:80", "--forward", "tcp:*:80"), TWICE),
        (("--selftest", "-r", "/proc/self/mem"), "vmctl: /proc/self/mem: Invalid argument"),
    ],
)
def test_refusals(arguments: tuple[str, ...], error: str) -> None:
    """Impossible options are refused in one line, before anything is made."""
    assert error == refused(*arguments)


def test_options_that_firmware_cannot_use() -> None:
    """An option that the image cannot use is an error that names both."""
    line = refused("--selftest", "--append", "quiet")
    assert "selftest.bin" in line
    assert "command line" in line


def test_leaves_nothing_behind() -> None:
    """A killed VM leaves no process, and no file in the temporary directory."""
    before = set(Path("/dev/shm").iterdir()) | set(Path("/tmp").iterdir())
    with selftest() as vm:
        vm.expect("selftest: ready", READY_S)
        vm.signal(signal.SIGKILL)
        assert vm.wait() == -signal.SIGKILL
    after = set(Path("/dev/shm").iterdir()) | set(Path("/tmp").iterdir())
    assert not {path for path in after - before if "vmm" in path.name}


@pytest.mark.parametrize("name", ["bios-256k.bin", "bios.bin"])
def test_seabios_finds_nothing_to_boot(name: str) -> None:
    """SeaBIOS, on its serial console, reports that there is no bootable device."""
    firmware = Path("/usr/share/seabios") / name
    if not firmware.exists():
        pytest.skip(f"{firmware} is missing: install seabios")
    with ConsoleProcess(vmctl_run("-b", firmware, "-m", "64M", "--timeout", "60")) as vm:
        vm.expect(r"SeaBIOS \(version", READY_S)
        vm.expect("No bootable device", READY_S)
