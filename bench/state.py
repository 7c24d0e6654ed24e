"""Time clones of a machine by fork, and saving and restoring one: here, on this KVM.

The guest is the self-test guest, which counts seconds and echoes a byte. For each memory size the
host touches the same number of pages before the first clone. It measures:

- clone: from the start of `pause` to the clone's first byte;
- still: the time for which the source is paused: pause, state, fork, resume;
- state: saving the state of KVM and the devices, and restoring it into a new machine;
- private: the clone's private memory, after it has answered;
- many: COUNT clones of one source, from the first fork until all have answered;
- sent: the time for which the machine is paused while it is written into a pipe to another process,
  when it is copied while it runs, and when it is copied into a file, as for a snapshot;
- captured: the same for the daemon's clones of a VM that runs, once and again; and the processor's
  time in that pause, which others on the machine do not change.

`python -m bench.state [--rounds N] [--clones N] [--touched MIB] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

from vmm_kvm.arch.x86.image import open_image
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.boot.firmware import selftest_path
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.clone import fork
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec
from vmm_kvm.machine.state import restore, save
from vmm_kvm.memfd import make_scratch
from vmm_kvm.memory import adopt
from vmm_kvm.primitives import Vmm
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.fds import FdSink
from vmm_kvm.snapshot.file import FileWriter, Layout
from vmm_kvm.snapshot.manifest import Host, Manifest, Owner
from vmm_kvm.snapshot.precopy import Plan, copy_into, copy_running
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import write_stream

_READY = b"selftest: ready"
_ECHO = b"~"
_PATIENCE_S = 60
_SENDS = 5
_STATE_ROOM = 8 * MIB
_TOUCHED_START = 16 * MIB


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one machine; times in milliseconds."""

    memory_mib: int
    cpus: int
    touched_mib: int
    clone_p50: float
    clone_least: float
    still_p50: float
    save_p50: float
    restore_p50: float
    private_mib: float
    many: int
    many_s: float
    sent_still_ms: float
    live_still_ms: float
    snapshot_still_ms: float
    snapshot_ms: float
    capture_still_ms: float
    capture_cpu_ms: float
    capture_ms: float
    recapture_still_ms: float
    recapture_cpu_ms: float


class Source:
    """A machine with the self-test guest, and what it printed."""

    def __init__(self, vmm: Vmm, memory_mib: int, cpus: int) -> None:
        """Describe it; nothing runs yet."""
        self.vmm = vmm
        self.loop = EventLoop()
        self.output = bytearray()
        self.spec = MachineSpec(
            image=open_image(str(selftest_path())),
            memory_size=memory_mib * MIB,
            cpus=cpus,
            name="bench",
        )

    def machine(self, *, is_restored: bool = False) -> Machine:
        """Build one."""
        return Machine(
            self.spec,
            self.vmm,
            self.loop,
            transmit=self._transmit,
            on_receive_room=lambda: None,
            on_outcome=lambda _: None,
            is_restored=is_restored,
        )

    def _transmit(self, data: bytes) -> None:
        self.output.extend(data)
        self.loop.call_soon(self.loop.stop)

    def wait_for(self, text: bytes) -> None:
        """Run the loop until the guest has printed `text`."""
        end = time.monotonic() + _PATIENCE_S
        while text not in self.output:
            self.loop.run()
            if time.monotonic() > end:
                raise SystemExit("state: the guest does not answer")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clones", type=int, default=100)
    parser.add_argument("--touched", type=int, default=40, help="MiB")
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 2048], help="MiB")
    parser.add_argument("--cpus", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    install_kick_signal()
    results = []
    print(
        "memory  vCPUs  clone p50 (least)  still  save  restore  private  many  "
        "sent  live  file  captured"
    )
    for memory_mib in options.memory:
        for cpus in options.cpus:
            with _source(memory_mib, cpus, options.touched) as (source, machine):
                result = _measure(source, machine, options.rounds, options.clones, options.touched)
            results.append(result)
            print(
                f"{result.memory_mib:5}M {result.cpus:6} "
                f"{result.clone_p50:10.1f} ({result.clone_least:.1f}) ms "
                f"{result.still_p50:6.1f} {result.save_p50:6.2f} {result.restore_p50:6.2f} "
                f"{result.private_mib:6.1f}M {result.many} in {result.many_s:.2f} s "
                f"{result.sent_still_ms:6.0f} {result.live_still_ms:6.0f} "
                f"{result.snapshot_still_ms:6.1f} of {result.snapshot_ms:.0f} ms "
                f"{result.capture_still_ms:6.1f} ({result.capture_cpu_ms:.1f}), "
                f"{result.recapture_still_ms:.1f} ({result.recapture_cpu_ms:.1f}) "
                f"of {result.capture_ms:.0f} ms",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


@contextmanager
def _source(memory_mib: int, cpus: int, touched_mib: int) -> Iterator[tuple[Source, Machine]]:
    with Kvm() as kvm, Vmm(kvm) as vmm:
        source = Source(vmm, memory_mib, cpus)
        with source.machine() as machine:
            view = machine.memory.view(_TOUCHED_START, touched_mib * MIB)
            for at in range(0, len(view), PAGE_SIZE):
                view[at] = 1
            machine.start()
            source.wait_for(_READY)
            yield source, machine


def _measure(
    source: Source, machine: Machine, rounds: int, clones: int, touched_mib: int
) -> Result:
    times, stills, privates = [], [], []
    for _ in range(rounds):
        clone_ms, still_ms, private = _clone_once(source, machine)
        times.append(clone_ms)
        stills.append(still_ms)
        privates.append(private)
    saves, restores = _save_and_restore(source, machine, rounds)
    many_s = _clone_many(source, machine, clones)
    still_ms = statistics.median(_send(machine, is_live=False) for _ in range(_SENDS))
    live_ms = statistics.median(_send(machine, is_live=True) for _ in range(_SENDS))
    snapshots = [_snapshot(machine) for _ in range(_SENDS)]
    capture_still_ms, capture_cpu_ms, capture_ms = _capture(machine)
    source.output.clear()
    machine.uart.receive(_ECHO)
    source.wait_for(_ECHO)
    recapture_still_ms, recapture_cpu_ms, _ = _capture(machine)  # of small pages
    return Result(
        source.spec.memory_size // MIB,
        source.spec.cpus,
        touched_mib,
        statistics.median(times),
        min(times),
        statistics.median(stills),
        statistics.median(saves),
        statistics.median(restores),
        statistics.median(privates) / MIB,
        clones,
        many_s,
        still_ms,
        live_ms,
        statistics.median(still for still, _ in snapshots),
        statistics.median(all_ms for _, all_ms in snapshots),
        capture_still_ms,
        capture_cpu_ms,
        capture_ms,
        recapture_still_ms,
        recapture_cpu_ms,
    )


def _send(machine: Machine, *, is_live: bool) -> float:
    """Return for how many milliseconds a machine is paused to be written into a pipe."""
    reader, writer = os.pipe()
    drain = subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL)
    os.close(reader)
    manifest = _manifest(machine)
    halt = _Halt(machine)
    with FdSink(writer, _PATIENCE_S) as sink:
        if is_live:
            dirty = machine.dirty_pages()
            dirty.begin()
            copy_running(sink, manifest, machine.memory, dirty, halt)
        else:
            state = halt()
            described = manifest._replace(state_size=len(state))
            write_stream(sink, described, state, machine.memory)
    took = time.perf_counter() - halt.at
    if is_live:
        dirty.end()
    machine.resume()
    drain.wait()
    return took * 1000


def _manifest(machine: Machine) -> Manifest:
    return Manifest(
        name="bench",
        created_ns=0,
        host=Host("", 0),
        cpuid=(),
        owner=Owner(None, None),
        memory_size=machine.spec.memory_size,
        cpus=machine.spec.cpus,
        regions=tuple((region.gpa, region.size) for region in machine.memory.regions),
        state_size=0,
    )


class _Halt:
    """Pauses a machine, and returns its state.

    `at` is when, of the performance counter; `cpu` of the thread's time.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.at = self.cpu = 0.0

    def __call__(self) -> bytes:
        self.at, self.cpu = time.perf_counter(), time.thread_time()
        self._machine.pause()
        saved = save(self._machine)
        return states.encode(State(saved.parts, saved.blobs))


def _snapshot(machine: Machine) -> tuple[float, float]:
    """Return for how long a machine is paused for a snapshot, and the time of it all, in ms."""
    halt = _Halt(machine)
    began = time.perf_counter()
    with TemporaryFile() as file:
        dirty = machine.dirty_pages()
        dirty.begin()
        layout = Layout.of(_STATE_ROOM, machine.memory.size)
        writer = FileWriter(file.fileno(), _manifest(machine), layout)
        copy_into(writer, machine.memory, dirty, halt, plan=lambda: Plan(0.01))
        machine.resume()
        ended = time.perf_counter()
        dirty.end()
    return (ended - halt.at) * 1000, (ended - began) * 1000


class _Memory:
    """RAM as clones of a running VM map it; see `precopy.Writer`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.written = 0

    def write_run(self, offset: int, data: bytes) -> None:
        """Write whole pages."""
        self.written += os.pwrite(self._fd, data, offset)

    def finish(self, _state: bytes) -> None:
        """Write nothing."""


def _capture(machine: Machine) -> tuple[float, float, float]:
    """Return how long a machine is paused to be cloned by the daemon, and the time of it all.

    In between is the processor's time of the pause; all in milliseconds.
    """
    halt = _Halt(machine)
    began = time.perf_counter()
    fd = make_scratch("bench")
    os.ftruncate(fd, machine.memory.size)
    dirty = machine.dirty_pages()
    dirty.begin()
    copy_into(_Memory(fd), machine.memory, dirty, halt, plan=lambda: Plan(0.002))
    finish = adopt(machine.memory, fd)
    machine.resume()
    ended, cpu = time.perf_counter(), time.thread_time() - halt.cpu
    finish()
    dirty.end()
    os.close(fd)
    return (ended - halt.at) * 1000, cpu * 1000, (ended - began) * 1000


def _clone_once(source: Source, machine: Machine) -> tuple[float, float, int]:
    """Return milliseconds to the first byte, milliseconds of the source's pause, and bytes."""
    reader, writer = os.pipe()
    began = time.perf_counter()
    machine.pause()
    pid = _child(source, machine, writer)
    machine.resume()
    still = time.perf_counter() - began
    os.close(writer)
    if os.read(reader, 1) != _ECHO:
        raise SystemExit("state: a clone does not answer")
    took = time.perf_counter() - began
    private = private_size(pid)
    _end([pid])
    os.close(reader)
    return took * 1000, still * 1000, private


def _clone_many(source: Source, machine: Machine, count: int) -> float:
    reader, writer = os.pipe()
    machine.pause()
    began = time.perf_counter()
    pids = [_child(source, machine, writer) for _ in range(count)]
    os.close(writer)
    answered = b""
    while len(answered) < count:
        piece = os.read(reader, count)
        if not piece:
            raise SystemExit(f"state: {len(answered)} of {count} clones answer")
        answered += piece
    took = time.perf_counter() - began
    machine.resume()
    _end(pids)
    os.close(reader)
    return took


def _child(source: Source, machine: Machine, writer: int) -> int:
    """Fork a clone that writes its guest's first byte, and waits to be killed."""
    pid = fork(machine)
    if pid:
        return pid
    status = 1
    try:
        source.output.clear()
        machine.start()
        machine.resume()
        machine.uart.receive(_ECHO)
        source.wait_for(_ECHO)
        os.write(writer, _ECHO)
        os.close(writer)
        signal.pause()
        status = 0
    finally:
        os._exit(status)


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def private_size(pid: int) -> int:
    """Return the private memory of a process, in bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(
        int(line.split()[1]) * 1024
        for line in rollup.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


def _save_and_restore(
    source: Source, machine: Machine, rounds: int
) -> tuple[list[float], list[float]]:
    saves, restores = [], []
    machine.pause()
    for _ in range(rounds):
        began = time.perf_counter()
        state = save(machine)
        saves.append((time.perf_counter() - began) * 1000)
        with source.machine(is_restored=True) as other:
            began = time.perf_counter()
            restore(other, state)
            restores.append((time.perf_counter() - began) * 1000)
    machine.resume()
    return saves, restores


if __name__ == "__main__":
    main()
