"""Show what the project does: a self-test guest, a daemon with several, then a Debian kernel.

The self-test guest runs on this machine's own /dev/kvm, and the Debian kernel too if this machine's
KVM runs distribution kernels. If it only emulates guest kernels, the demo says so and boots the
Debian kernel in the rig, a full KVM host under QEMU's software emulation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import artifacts, host  # noqa: E402 - found by the line above
from tests.rig.machine import Rig, project_stages  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, ConsoleTimeoutError, vmctl_run  # noqa: E402
from vmm_kvm.standard_streams import run_program  # noqa: E402

# The shell may ask where the cursor is; a terminal's answer would be typed into the next program.
CURSOR_QUERY = b"\x1b[6n"
PROMPT = r"^[/~] # (\x1b\[6n)?$"  # newer shells show / as ~, because it is the home too
COMMANDS = (
    "uname -a",
    "nproc",
    "free",
    "cat /proc/cpuinfo | head",
    "dmesg | tail",
)
VMCTL = vmctl_run()[0]


# The second and third VM start two seconds after the one before; "spare" is started by hand.
VM_CONF = """\
staggered start parallel 1 delay 2
selftest = "{selftest}"

vm "web" {{
	memory 64M
	boot $selftest
}}
vm "mail" {{
	memory 64M
	boot $selftest
}}
vm "build" {{
	memory 64M
	cpus 2
	boot $selftest
}}
vm "spare" {{
	disable
	memory 64M
	boot $selftest
}}
"""


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m== {text}\033[0m", flush=True)


def show(data: bytes) -> None:
    """Pass on the output of a guest's console, without its questions to a terminal."""
    sys.stdout.buffer.write(data.replace(CURSOR_QUERY, b""))
    sys.stdout.buffer.flush()


def start(*arguments: str | Path) -> ConsoleProcess:
    """Start `vmctl run` with these arguments on a terminal of its own, shown on ours."""
    words = vmctl_run(*arguments)
    said = [f'"{word}"' if " " in word else word for word in ("vmctl", *words[1:])]
    say(f"$ {' '.join(said)}")
    return ConsoleProcess(words, is_tty=True, on_output=show)


def ended(guest: ConsoleProcess) -> int:
    """Wait for a guest to end; show and return its exit status."""
    status = guest.wait()
    say(f"exit status {status}")
    return status


def selftest() -> int:
    """Run the self-test guest: let it count, reboot it, press its power key."""
    with start("-m", "64M", "-p", "2", "--selftest") as guest:
        guest.expect("selftest: ready")
        guest.send("n")
        guest.expect(r"^3\b")
        guest.send("r")
        guest.expect("selftest: ready")
        guest.send("p")
        return ended(guest)


def vmctl(*words: str) -> None:
    """Run a command of vmctl, shown with its output.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    say(f"$ vmctl {' '.join(words)}")
    subprocess.run((VMCTL, *words), check=True, timeout=60)


def running(count: int) -> None:
    """Wait until `count` VMs run, showing `vmctl status` whenever it changes.

    Raises:
        ConsoleTimeoutError: they do not run within a minute.
    """
    shown = ""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        command = (VMCTL, "status")
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        states = [line.split()[-2] for line in told.splitlines()[1:]]
        if str(states) != shown:
            shown = str(states)
            say("$ vmctl status")
            print(told, end="", flush=True)
        if states.count("running") >= count:
            return
        time.sleep(0.2)
    raise ConsoleTimeoutError(f"{count} VMs do not run after a minute")


def daemon() -> int:
    """Run vmd as a user does: VMs that start staggered, a console, pause, stop, and its end."""
    with tempfile.TemporaryDirectory(prefix="vmd-demo-") as scratch:
        folder = Path(scratch)
        config = folder / "vm.conf"
        config.write_text(VM_CONF.format(selftest=ROOT / "bios" / "selftest.bin"))
        os.environ |= {"XDG_RUNTIME_DIR": scratch, "VMD_SOCKET": f"{scratch}/vmd.sock"}
        say("$ cat vm.conf")
        print(config.read_text(), end="")
        vmd = [str(Path(VMCTL).with_name("vmd")), "--user", "-d", "-f", str(config)]
        say(f"$ vmd {' '.join(vmd[1:])} &")
        with subprocess.Popen(vmd, stdin=subprocess.DEVNULL) as process:
            try:
                _wait_for(folder / "vmd.sock")
                running(3)
                vmctl("start", "spare")
                console()
                vmctl("pause", "mail")
                vmctl("status", "mail")
                vmctl("unpause", "mail")
                vmctl("stop", "-w", "mail")
                wait_for_end("build")
                vmctl("status")
            finally:
                say("$ kill %1")
                process.terminate()
            status = process.wait()
        left = sorted(path.name for path in folder.iterdir() if path != config)
        say(f"vmd's exit status {status}; left behind: {', '.join(left) or 'nothing'}")
        return status or len(left)


def console() -> None:
    """Attach to a VM's console, let the guest count, and detach."""
    say("$ vmctl console web")
    with ConsoleProcess((VMCTL, "console", "web"), is_tty=True, on_output=show) as terminal:
        terminal.expect("selftest: ready")
        terminal.send("n")
        terminal.expect(r"^3\b")
        terminal.send("\r~.")
        ended(terminal)


def wait_for_end(name: str) -> None:
    """Have one command wait for a VM's end while another stops it."""
    command = (VMCTL, "wait", name)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as waiter:
        assert waiter.stdout is not None
        told = waiter.stdout.read(1)  # it waits from here on, before the VM stops
        vmctl("stop", "-f", name)
        told += waiter.stdout.read()
    say(f"$ vmctl wait {name}    # since before it was stopped")
    show(told)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConsoleTimeoutError(f"{path.name} does not appear")
        time.sleep(0.05)


def linux() -> int:
    """Boot Debian's cloud kernel to a shell and run a few commands in it."""
    kernel = artifacts.kernel("cloud")
    image = artifacts.guest_initramfs(kernel)
    with start(
        *("-m", "256M", "-p", "2", "-b", kernel.vmlinuz, "--initrd", image),
        *("--append", "console=ttyS0 quiet"),
    ) as guest:
        for command in (*COMMANDS, "poweroff -f"):
            guest.expect(PROMPT)
            guest.send(f"{command}\n")
        return ended(guest)


def demo() -> int:
    """Run both guests where they can run; return an exit status."""
    say("The self-test guest, on this machine's /dev/kvm")
    missing = host.missing_kvm()
    if missing is not None:
        print(f"{missing}: left out")
    else:
        if selftest() != 0:
            return 1
        say("The daemon, as a user's, with four self-test guests")
        if daemon() != 0:
            return 1
    say("A Debian cloud kernel with a busybox initramfs")
    missing = host.missing_guest_kvm()
    if missing is None:
        return linux()
    print(
        "This machine's KVM does not run a distribution kernel (it emulates guest kernels, or is\n"
        "absent). So a machine is emulated whose KVM does, and the guest runs inside it: the rig."
    )
    artifacts.guest_initramfs(artifacts.kernel("cloud"))
    inside = (sys.executable, __file__, "--linux")
    return Rig(inside, stages=project_stages(ROOT), timeout_s=600).run()


def main() -> int:
    """Run the demo; errors are one line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--linux", action="store_true", help="only the Debian kernel, and here")
    given = parser.parse_args()
    try:
        return linux() if given.linux else demo()
    except (artifacts.ArtifactError, ConsoleTimeoutError, subprocess.SubprocessError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_program("demo", main)
