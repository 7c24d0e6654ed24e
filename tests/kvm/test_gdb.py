"""Debugging a guest of `vmctl run --gdb`: by gdb itself, and with packets that gdb never sends."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import debugged_guest as guest
from tests.debugging import (
    DEADLINE_S,
    PLAIN,
    Client,
    debugged,
    debugged_process,
    run_gdb,
    wait_for,
)
from tests.vmctl_driver import VMCTL
from vmm_kvm.gdb.packets import framed

pytestmark = pytest.mark.kvm

SCRIPT = f"""
hbreak *{guest.AFTER_COUNTING:#x}
continue
x/dw {guest.COUNTER:#x}
stepi
stepi
print/x $rip
delete
break *{guest.MAIN:#x}
continue
x/3xb {guest.MAIN:#x}
print $rip == {guest.MAIN:#x}
delete
set var *(int *){guest.COUNTER:#x} = 1000
hbreak *{guest.AFTER_COUNTING:#x}
continue
x/dw {guest.COUNTER:#x}
set $rbx = 0x1234
set $xmm3.v2_int64[1] = 77
stepi
stepi
print/x $rbx
print $xmm3.v2_int64[1]
print $cs
print $cr0 & 1
thread 2
print $rip == {guest.SECOND:#x} || $rip == {guest.SECOND_JUMP:#x}
set scheduler-locking on
stepi
print $rip == {guest.SECOND:#x} || $rip == {guest.SECOND_JUMP:#x}
thread 1
print/x $rip
delete
"""


def test_gdb_finds_what_qemus_stub_shows(tmp_path: Path) -> None:
    """Breakpoints of each kind, steps, registers, two processors: gdb prints as on QEMU."""
    with debugged(tmp_path, ",wait") as path:
        ours = run_gdb(path, SCRIPT)
    qemu_path = tmp_path / "qemu"
    qemu = subprocess.Popen(
        [
            *(shutil.which("qemu-system-x86_64") or "", "-M", "pc", "-accel", "tcg", "-m", "4"),
            *("-smp", "2", "-display", "none", "-nodefaults", "-S"),
            *("-cpu", "max", "-bios", str(tmp_path / "guest.rom")),
            *("-gdb", f"unix:{qemu_path},server=on,wait=off"),
        ]
    )
    try:
        wait_for(qemu_path)
        theirs = run_gdb(qemu_path, SCRIPT)
    finally:
        qemu.kill()
        qemu.wait()
    assert _plain(ours) == _plain(theirs)
    assert "= 0x1235" in ours
    assert ours.count("= 1\n") == 3


def _plain(text: str) -> list[str]:
    """Return gdb's lines without names of threads, and without the place of the second one."""
    second = f"0x0*({guest.SECOND:x}|{guest.SECOND_JUMP:x})"
    lines = [re.sub(r"Thread [\d.]+( \(.*?\))?", "THREAD", line) for line in text.splitlines()]
    return [re.sub(second, "SECOND", line) for line in lines if not line.endswith("detached]")]


def test_a_vm_waits_for_its_debugger(tmp_path: Path) -> None:
    """With wait nothing runs before gdb; once detached it runs, without breakpoints in memory."""
    with debugged(tmp_path, ",wait") as path:
        with Client(path) as client:
            assert client.ask(b"?").startswith(b"T02thread:1;")
            assert client.counter() == 0
            assert client.ask(b"D") == b"OK"
        time.sleep(1)
        with Client(path) as client:
            assert client.counter() > 0
            before = client.ask(b"m%x,10" % guest.MAIN)
            assert client.ask(b"Z0,%x,1" % guest.MAIN) == b"OK"
            assert client.ask(b"m%x,10" % guest.MAIN) == before
            assert b"swbreak" in client.ask(b"vCont;c")
            at = client.counter()
        end = time.monotonic() + DEADLINE_S
        while True:
            with Client(path) as client:
                assert client.ask(b"m%x,10" % guest.MAIN) == before
                if client.counter() > at + 1:
                    break
            assert time.monotonic() < end


def test_breakpoints_in_memory_are_there_only_while_it_runs(tmp_path: Path) -> None:
    """More breakpoints than registers work, and the debugger never sees the patched bytes."""
    with debugged(tmp_path) as path, Client(path) as client:
        before = client.ask(b"m%x,40" % guest.END)
        for offset in range(6):  # addresses that it never reaches
            assert client.ask(b"Z0,%x,1" % (guest.END + offset)) == b"OK"
        client.send(b"vCont;c")
        time.sleep(0.2)
        client.sock.sendall(b"\x03")
        assert client.answer().startswith(b"T02")
        assert client.ask(b"m%x,40" % guest.END) == before


def test_interrupting_and_ending(tmp_path: Path) -> None:
    """0x03 stops a running guest; the debugger learns its end, and the socket is gone."""
    with debugged(tmp_path, ends=True) as path, Client(path) as client:
        first = client.counter()
        client.sock.sendall(framed(b"vCont;c"))
        time.sleep(0.1)
        client.sock.sendall(b"\x03")
        assert client.answer().startswith(b"T02")
        assert client.counter() > first
        rip = client.ask(b"p10")
        assert guest.MAIN <= int.from_bytes(bytes.fromhex(rip.decode()), "little") <= guest.JUMP
        assert client.ask(b"P10=" + guest.END.to_bytes(8, "little").hex().encode()) == b"OK"
        client.sock.sendall(framed(b"vCont;c:1"))
        assert client.answer().startswith(b"W")
    assert not path.exists()


def test_only_those_that_are_told_run(tmp_path: Path) -> None:
    """A processor that is not named stays stopped, while the other one runs or steps."""
    with debugged(tmp_path) as path, Client(path) as client:
        assert client.ask(b"qfThreadInfo") == b"m1,2"
        while client.counter(guest.SECOND_COUNTER) == 0:  # it has not started yet
            client.sock.sendall(framed(b"vCont;c"))
            time.sleep(0.2)
            client.sock.sendall(b"\x03")
            client.answer()
        _run_second(client)
        still, moved = client.counter(), client.counter(guest.SECOND_COUNTER)
        _run_second(client)
        assert client.counter() == still
        assert client.counter(guest.SECOND_COUNTER) > moved
        for _ in range(8):
            assert client.ask(b"vCont;s:1").startswith(b"T05thread:1;")
        assert still + 2 <= client.counter() <= still + 3


def _run_second(client: Client) -> None:
    """Let the second processor alone run until it has counted."""
    before = client.counter(guest.SECOND_COUNTER)
    end = time.monotonic() + DEADLINE_S
    while client.counter(guest.SECOND_COUNTER) == before:
        assert time.monotonic() < end
        client.sock.sendall(framed(b"vCont;c:2"))
        time.sleep(0.2)
        client.sock.sendall(b"\x03")
        assert client.answer().startswith(b"T02")


def test_a_lost_debugger_lets_go(tmp_path: Path) -> None:
    """If SIGKILL ends gdb, the VM runs on; a second gdb beside the first is refused."""
    with debugged(tmp_path) as path:
        first = subprocess.Popen(
            ["gdb", "-nx", "-q", "-ex", f"target remote {path}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=PLAIN,
        )
        assert first.stdout is not None
        seen = b""
        while b"in ?? ()" not in seen:
            seen += os.read(first.stdout.fileno(), 4096)
        with Client(path) as client:
            assert client.answer() == b""
        first.send_signal(signal.SIGKILL)
        first.communicate()
        end = time.monotonic() + DEADLINE_S
        counts: set[int] = set()
        while len(counts) < 2:
            assert time.monotonic() < end
            try:
                with Client(path) as client:
                    counts.add(client.counter())
            except (OSError, ValueError):  # the first one's end has not been noticed yet
                time.sleep(0.05)


def test_a_debugger_that_has_gone_is_in_nobodys_way(tmp_path: Path) -> None:
    """One that comes before the VM has noticed the last one's end is served, and not refused."""
    with debugged_process(tmp_path) as (path, pid):
        for last_words in (b"", framed(b"vCont;c"), framed(b"m0,4"), b"$without end"):
            os.kill(pid, signal.SIGSTOP)  # so that it finds all of them at once
            with Client(path) as gone:
                gone.sock.sendall(last_words)
            with Client(path) as client, Client(path) as refused:
                os.kill(pid, signal.SIGCONT)
                assert client.ask(b"?").startswith(b"T02thread:1;"), last_words
                assert refused.answer() == b""
                assert client.ask(b"D") == b"OK"


_REFUSED = (
    *(b"g1", b"p", b"pffff", b"p-1", b"P10=00", b"P0=zz", b"G00", b"m", b"m0", b"m-1,4", b"m0,zz"),
    *(
        b"mffff0000ffff0000,8",
        b"M0,4:00",
        b"X0,4:0",
        b"Z1,zz,1",
        b"Z2,1,3",
    ),
    *(
        b"Z2,1,4",
        b"Z9",
        b"H",
        b"Hg99",
        b"Hgzz",
        b"T99",
        b"Tzz",
        b"vCont;x",
        b"vCont;c:99",
        b"vCont;",
    ),
    *(b"qXfer:features:read:target.xml:zz", b"qXfer:features:read:target.xml:-1,4", b"\xff\xfe"),
)


def test_nonsense_is_refused(tmp_path: Path) -> None:
    """The answer to each malformed packet is an error or empty, and the session continues."""
    with debugged(tmp_path) as path, Client(path) as client:
        for packet in _REFUSED:
            answer = client.ask(packet)
            assert answer in {b"", b"E01"} or packet == b"g1", (packet, answer)
        assert client.ask(b"qC") == b"QC1"
        for number in range(4):
            assert client.ask(b"Z1,%x,1" % number) == b"OK"
        assert client.ask(b"Z1,9,1") == b"E01"


def test_garbage_ends_a_session_at_most(tmp_path: Path) -> None:
    """The VM survives random bytes, a packet without end, and an answer that nobody reads."""
    random_ = random.Random(1)
    with debugged(tmp_path) as path:
        for size in (10, 1000, 200_000):
            with Client(path) as client:
                data = bytes(random_.randrange(256) for _ in range(size))
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.sock.sendall(b"$" + data.replace(b"#", b""))
                    while size > 100_000 and client.sock.recv(65536):
                        pass
        with Client(path) as client:
            for _ in range(300):
                letters = bytes(random_.choice(b"gGpPmMXZzHTcsvqQ?,;:=0123abf-") for _ in range(9))
                if letters[:1] in b"csvqQ":  # packets that resume the guest have no own answer
                    letters = b"m" + letters
                client.ask(letters)
            assert client.ask(b"?").startswith(b"T")


def test_what_is_refused_before_a_start(tmp_path: Path) -> None:
    """An unusable socket is reported in one line with status 1; existing files are left alone."""
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    for words, line in (
        (str(taken), f"vmctl: {taken}: is there, and no socket\n"),
        ("/nonexistent/gdb", "vmctl: /nonexistent/gdb: No such file or directory\n"),
        (",wait", "vmctl: --gdb: no socket named: path[,wait]\n"),
    ):
        done = subprocess.run(
            [VMCTL, "run", "--selftest", "--gdb", words],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert taken.read_bytes() == b"mine"
