"""Writing a VM into a stream or a snapshot: by a thread of its own process, while the guest runs.

It is paused for its last changes (`snapshot.precopy`), or for all of it if it was paused before, or
if some device writes to its memory without logging.

It is a thread, not another process, because guest memory may be private to this process, and
because a VM process may not fork. The event loop runs meanwhile: the stream's reader may be slow,
within limits, and the daemon can cancel the writing at any time.

For a snapshot the guest runs again when the page cache has all data, before the file is durable.

A VM runs in one place. When the last byte is written, it is the receiver's, and never continues
here, unless that was requested; before that it is ours, since the receiver does not run a partial
VM.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from vmd.config.disks import DiskKind
from vmd.vm.disk_copies import (
    DiskMirror,
    KeptDisk,
    copies,
    kept_disks,
    movable_disks,
    with_kept,
)
from vmd.wire.internal import NicSpec, VmSpec
from vmd.wire.leaving import MIGRATING_MAX, SendVm
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.smbios import name_uuid
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.state import save
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord
from vmm_kvm.snapshot.fds import FdSink, FdSource
from vmm_kvm.snapshot.file import FileWriter, Layout, empty_file, write_into
from vmm_kvm.snapshot.generations import Generation, with_generations
from vmm_kvm.snapshot.handover import await_wanted_disks, hand_over, why_gone
from vmm_kvm.snapshot.manifest import Boot, Disk, Firmware, Host, Interface, Manifest, Owner
from vmm_kvm.snapshot.precopy import Plan, Progress, Writer, copy_into, copy_still
from vmm_kvm.snapshot.ram import place
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.storage import StorageWriter
from vmm_kvm.snapshot.stream import LiveWriter, write_stream

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine

PATIENCE_S = 30.0
"""How long the peer may take no byte, or send none."""
HANDOVER_PATIENCE_S = 2 * PATIENCE_S
"""The time for the receiver to check all data, and to build the machine."""
_SNAPSHOT_DOWNTIME_S = 0.01
"""Target of the pause for memory when a machine is written to a file."""
_DISKS_STEP = 5  # percent of disks, between two messages
_LAST_WORDS_S = 5.0
"""For a receiver that takes nothing any more to say why."""
_STATE_ROOM = 8 << 20  # devices and vCPUs: some 20 KiB of each
_KERNEL = os.uname().release  # asked before this process is confined

Halt = Callable[[], None]
"""Pauses the machine; on the loop's thread."""
Generations = Callable[[], Mapping[int, Generation]]
OnEnd = Callable[["VmmError | OSError | None"], None]


class _Subject(NamedTuple):
    """The form of the target."""

    machine: "Machine"
    spec: VmSpec
    command: SendVm
    cpuid: tuple[CpuidRecord, ...]
    halt: Halt | None
    generations: Generations
    deadline_s: float | None
    """When it has taken too long, on the clock that does not jump."""
    kept: tuple[KeptDisk, ...]
    layout: Layout

    @property
    def saves_late(self) -> bool:
        """Whether the state is not there when writing begins."""
        plan = self.command.handover
        return self.halt is not None or bool(plan and plan.copies_storage)

    def manifest(self, state_size: int) -> Manifest:
        """Describe it."""
        manifest = manifest_of(self.machine, self.spec, self.command, state_size, self.cpuid)
        return with_kept(manifest, self.kept, self.layout.disks)


class Sending:
    """A VM that is being written, from its pause to the last byte or the failure."""

    def __init__(
        self,
        loop: EventLoop,
        sink_fd: int,
        on_written: Callable[[], None],
        on_end: OnEnd,
        *,
        is_snapshot: bool = False,
        replies_fd: int | None = None,
        on_progress: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Take ownership of the descriptors.

        `replies_fd` is what the receiver says, if the VM is handed over. `on_progress` is told how
        far that is, or a snapshot that takes longer than a second, on the loop's thread.

        `on_end` is called once, on the loop's thread, when nothing is written any more: with None
        if all is, else with what went wrong. Of a snapshot, `on_written` is called before, when the
        machine need not stand still any more.

        Raises:
            SnapshotError: no machine can go through such a descriptor.
            OSError: it is closed.
        """
        self._loop = loop
        self._on_end = on_end
        self._on_progress = on_progress
        self._thread: threading.Thread | None = None
        self.is_still = False
        """Whether the machine is paused to be written."""
        self.is_written = False
        """Whether all of a snapshot is written, and is becoming durable."""
        self._said = 0
        self._percent = 0
        self._has_state = threading.Event()
        self._state: tuple[Manifest, bytes] | None = None
        self._storage: StorageWriter | None = None
        self._copied: frozenset[int] = frozenset()  # disks that go to the receiver
        self._failure: VmmError | OSError | None = None
        self._is_cancelled = False
        self._on_written = on_written
        self._cancel_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            if is_snapshot:
                empty_file(sink_fd)  # before disks are copied there, which RAM follows
            self._sink = FdSink(sink_fd, PATIENCE_S, self._cancel_fd)
            self._file = sink_fd if is_snapshot else None
            self._replies = None
            if replies_fd is not None:
                self._replies = FdSource(replies_fd, HANDOVER_PATIENCE_S, self._cancel_fd)
        except BaseException:
            os.close(self._cancel_fd)
            raise

    def begin(
        self,
        machine: "Machine",
        spec: VmSpec,
        command: SendVm,
        cpuid: tuple[CpuidRecord, ...],
        *,
        halt: Halt | None,
        generations: Generations,
    ) -> None:
        """Begin to write a machine; failures are reported later.

        `cpuid` is what this host's processor shows to such a guest. `halt` is called when a machine
        that runs has to stand still; None for one that does. `generations` returns those of its
        disks, which stand still then.
        """
        plan, deadline = command.handover, None
        if plan and plan.timeout_s:
            deadline = time.monotonic() + plan.timeout_s
        kept = kept_disks(machine, spec) if command.keeps_disks else ()
        sizes = [disk.size for disk in kept]
        layout = Layout.of(_state_room(machine), machine.memory.size, sizes)
        subject = _Subject(machine, spec, command, cpuid, halt, generations, deadline, kept, layout)
        write = self._write_running
        if plan and plan.copies_storage:
            write = self._write_with_storage
            self.is_still = halt is None
        elif halt is None:
            self._save(subject)
            write = self._write
        self._thread = threading.Thread(target=self._run, args=(write, subject), name="sending")
        self._thread.start()

    def _save(self, subject: "_Subject") -> None:
        """Pause a machine and take its state, on the loop's thread."""
        try:
            self.is_still = True
            if subject.halt:
                subject.halt()
            saved = save(subject.machine)
            found = State(saved.parts, saved.blobs)
            kept = {disk.place for disk in subject.kept} | self._copied
            known = {at: one for at, one in subject.generations().items() if at not in kept}
            state = states.encode(with_generations(found, known))
            manifest = subject.manifest(len(state))
        except (VmmError, OSError) as err:
            self._fail(err)
            return
        steps = copies(subject.kept, subject.layout.disks, -1 if self._file is None else self._file)
        self._copy_disks(steps, (manifest, state))

    def _fail(self, err: "VmmError | OSError") -> None:
        self._failure = err
        self._has_state.set()

    def _copy_disks(self, steps: Iterator[None], state: tuple[Manifest, bytes]) -> None:
        """Copy the next part of the disks, and let the loop run before the one after that."""
        if self._is_cancelled:
            self._fail(SnapshotError("it was cancelled"))
            return
        try:
            for _ in steps:
                self._loop.call_soon(lambda: self._copy_disks(steps, state))
                return
        except (VmmError, OSError) as err:
            self._fail(err)
            return
        self._state = state
        self._has_state.set()

    def _saved(self, subject: "_Subject") -> tuple[Manifest, bytes]:
        """Return the state of the machine, which is paused from now on.

        Raises:
            VmmError, OSError: it cannot be taken, or is not wanted any more.
        """
        if subject.saves_late:
            self._loop.call_soon(lambda: self._save(subject))
        self._has_state.wait()
        if self._state is None:
            raise self._failure or SnapshotError("it was cancelled")
        return self._state

    def cancel(self) -> None:
        """Write no more, if it is not too late."""
        self._is_cancelled = True
        if self._cancel_fd >= 0:
            os.eventfd_write(self._cancel_fd, 1)

    def abandon(self) -> None:
        """Stop writing, and wait for the thread; the loop does not run any more."""
        self.cancel()
        self._has_state.set()
        if self._thread:
            self._thread.join()

    def _run(self, write: "Callable[[_Subject], None]", subject: "_Subject") -> None:
        failure: VmmError | OSError | None = None
        try:
            write(subject)
            if self._file is not None:
                self._loop.call_soon(self._on_written)
            self._sink.finish()
            if self._replies:
                sink = self._storage or self._sink
                hand_over(sink, self._replies, subject.machine.lend_disks)
        except (BrokenPipeError, ConnectionResetError) as err:
            failure = err
            if self._replies:
                self._replies.wait_at_most(_LAST_WORDS_S)
                failure = why_gone(self._replies) or err
        except (VmmError, OSError) as err:
            failure = err
        self._loop.call_soon(lambda: self._end(failure))

    def _write(self, subject: "_Subject") -> None:
        manifest, state = self._saved(subject)
        memory = subject.machine.memory
        if self._file is None:
            write_stream(self._sink, manifest, state, memory)
        else:
            write_into(self._file_writer(subject, self._file), state, memory)

    def _file_writer(self, subject: "_Subject", fd: int) -> FileWriter:
        manifest = subject.manifest(0)
        size, began = subject.machine.memory.size, time.monotonic()

        def tell(end: int) -> None:
            seconds, percent = time.monotonic() - began, end * 100 // size
            # Rounds after the first begin anew, and are short.
            if seconds >= self._said + 1 and percent > self._percent:
                self._percent = percent
                self._say(f"{percent}%")

        return FileWriter(fd, manifest, subject.layout, lambda: self._is_cancelled, tell)

    def _write_running(self, subject: "_Subject") -> None:
        dirty = subject.machine.dirty_pages()
        unable = dirty.begin()
        if unable:
            self._say_of_handover(f"it stands still from the beginning, for {', '.join(unable)}")
            self._write(subject)
            return
        try:
            if self._file is None:
                writer: Writer = LiveWriter(self._sink, subject.manifest(0))
            else:
                writer = self._file_writer(subject, self._file)
            copy_into(
                writer,
                subject.machine.memory,
                dirty,
                lambda: self._saved(subject)[1],
                plan=lambda: _plan(subject),
                on_progress=self._tell_progress,
            )
        finally:
            dirty.end()

    def _write_with_storage(self, subject: "_Subject") -> None:
        """Write a machine, and disks that the receiver lacks."""
        machine, memory = subject.machine, subject.machine.memory
        assert self._replies is not None
        disks = movable_disks(machine, subject.spec)
        sizes = [disks[at].disk_size if at in disks else 0 for at in range(len(subject.spec.disks))]
        self._storage = StorageWriter(self._sink, sizes)
        writer = LiveWriter(self._storage, subject.manifest(0))
        self._copied = await_wanted_disks(self._replies, len(sizes)) & disks.keys()

        def halt() -> bytes:
            return self._saved(subject)[1]

        def plan() -> Plan:
            return _plan(subject)

        def keep_alive() -> None:  # of two copies of a page the later one counts
            view = place(memory, 0, PAGE_SIZE)
            assert view is not None
            writer.write_run(0, bytes(view))

        copied = {at: disks[at] for at in sorted(self._copied)}
        with DiskMirror(copied, self._storage, keep_alive, self._tell_disks) as storage:
            if subject.halt is None:
                copy_still(writer, memory, halt, plan=plan, storage=storage)
                return
            dirty = machine.dirty_pages()
            unable = dirty.begin()
            if unable:
                self._say_of_handover(f"it stands still for all of RAM, for {', '.join(unable)}")
                copy_still(writer, memory, halt, plan=plan, storage=storage)
                return
            try:
                tell = self._tell_progress
                copy_into(writer, memory, dirty, halt, plan=plan, on_progress=tell, storage=storage)
            finally:
                dirty.end()

    def _tell_disks(self, done: int, size: int) -> None:
        percent = min(100, done * 100 // max(1, size))
        if percent >= self._percent + _DISKS_STEP:
            self._percent = percent
            self._say_of_handover(f"disks: {percent}% copied")

    def _tell_progress(self, progress: Progress) -> None:
        left = -(-progress.left // MIB)
        done = progress.written // MIB
        self._say_of_handover(f"round {progress.round}: {done} MiB sent, {left} MiB left")

    def _say_of_handover(self, text: str) -> None:
        if self._replies:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._said < MIGRATING_MAX:
            self._said += 1
            self._loop.call_soon(lambda: self._on_progress(text))

    def _end(self, failure: "VmmError | OSError | None") -> None:
        self._sink.close()
        if self._replies:
            self._replies.close()
        os.close(self._cancel_fd)
        self._cancel_fd = -1
        self._on_end(failure)


def check_handover(spec: VmSpec) -> None:
    """Refuse a VM with a disk that only the end of its process lets go of.

    Raises:
        SnapshotError: which.
    """
    for disk in spec.disks:
        kind = disk.option.kind
        if kind is DiskKind.VHOST_USER or (kind is DiskKind.PMEM and not disk.option.is_private):
            what = "a vhost-user server has it" if kind is DiskKind.VHOST_USER else "it is memory"
            raise SnapshotError(f"disk {disk.option.path}: cannot be handed over: {what}")


def _plan(subject: _Subject) -> Plan:
    """Return for how long a machine may be paused now.

    Raises:
        SnapshotError: it has taken too long already.
    """
    plan = subject.command.handover
    if plan is None:
        return Plan(_SNAPSHOT_DOWNTIME_S) if subject.command.is_snapshot else Plan()
    if subject.deadline_s is not None and time.monotonic() > subject.deadline_s:
        if not plan.forces:
            raise SnapshotError(f"it has not come to {plan.downtime_ms} ms in {plan.timeout_s} s")
        return Plan(math.inf)
    return Plan(plan.downtime_ms / 1000, waits=True)


def _state_room(machine: "Machine") -> int:
    """Return how many bytes the state of a machine has at most, firmware included."""
    spec = machine.spec
    firmware = spec.image.size if isinstance(spec.image, FirmwareImage) else 0
    return _STATE_ROOM + firmware + (spec.variables.size if spec.variables else 0)


def manifest_of(
    machine: "Machine",
    spec: VmSpec,
    command: SendVm,
    state_size: int,
    cpuid: tuple[CpuidRecord, ...],
) -> Manifest:
    """Return the description of a machine whose state has `state_size` bytes."""
    image, boot = machine.spec.image, command.boot
    return Manifest(
        name=spec.name,
        memory_size=spec.memory,
        cpus=spec.cpus,
        regions=tuple((region.gpa, region.size) for region in machine.memory.regions),
        state_size=state_size,
        created_ns=time.time_ns(),
        host=Host(_KERNEL, 0),
        cpuid=cpuid,
        owner=Owner(command.uid, command.gid),
        uuid=machine.spec.uuid or name_uuid(machine.spec.name),
        serial=machine.spec.serial,
        boot=Boot(boot.image, boot.firmware, boot.initrd, boot.append, spec.boot_device.value),
        firmware=Firmware(image.name, image.size) if isinstance(image, FirmwareImage) else None,
        disks=tuple(_disks(spec)),
        cdrom=spec.cdrom_path or None,
        interfaces=tuple(map(_interface, spec.interfaces)),
        vsock_cid=machine.vsock.cid if machine.vsock else None,
        has_balloon=spec.has_balloon,
        has_watchdog=spec.has_watchdog,
    )


def _disks(spec: VmSpec) -> Iterable[Disk]:
    for disk in spec.disks:
        option = disk.option
        if disk.scratch is not None:
            raise SnapshotError(f"{option.path}: a throw-away disk stays with its VM")
        # A format that was probed once is not probed again: the guest has written since.
        kind = option.kind or (disk.formats[0] if disk.formats else option.kind)
        yield Disk(
            option.path,
            kind.value,
            option.serial,
            option.queues,
            option.is_read_only,
            option.is_private,
        )


def _interface(nic: NicSpec) -> Interface:
    config = nic.config
    return Interface(
        lladdr=nic.lladdr,
        mtu=nic.mtu,
        queues=config.queues or 1,
        is_local=config.is_local,
        switch=config.switch,
        group=config.group,
        rdomain=config.rdomain,
        is_locked=config.is_locked,
        is_up=nic.is_up,
    )
