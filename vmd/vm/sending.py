"""Writing a VM into a stream: by a thread of its own process, while the guest stands still.

It is a thread, and no other process, because only this process has the guest's memory where no
device process shares it, and because a VM process may make no others. The event loop goes on
meanwhile: the stream's other end may take its time, within limits, and the daemon can always say
that it is not to be written after all.

A VM runs once. When the last byte is written, it is the receiver's, and never goes on here, unless
it was asked to; before that, it is ours, whatever has gone out: the receiver does nothing with it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vmd.wire.internal import NicSpec, SendVm, VmSpec
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.smbios import name_uuid
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.state import save
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.cpu import CpuidRecord
from vmm_kvm.snapshot.fds import FdSink
from vmm_kvm.snapshot.manifest import Boot, Disk, Firmware, Host, Interface, Manifest, Owner
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import write_stream

if TYPE_CHECKING:
    from vmm_kvm.machine.machine import Machine

PATIENCE_S = 30.0
"""How long the other end may take no byte, or send none."""
_KERNEL = os.uname().release  # asked before this process is confined

OnEnd = Callable[["VmmError | OSError | None"], None]


class Sending:
    """A VM that is being written, from its pause to the last byte or the failure."""

    def __init__(self, loop: EventLoop, sink_fd: int, on_end: OnEnd) -> None:
        """Take ownership of `sink_fd`.

        `on_end` is called once, on the loop's thread, when nothing is written any more: with None
        if all is, else with what went wrong.

        Raises:
            SnapshotError: no machine can go through such a descriptor.
            OSError: it is closed.
        """
        self._loop = loop
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self._cancel_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._sink = FdSink(sink_fd, PATIENCE_S, self._cancel_fd)
        except BaseException:
            os.close(self._cancel_fd)
            raise

    def begin(
        self,
        machine: "Machine",
        spec: VmSpec,
        command: SendVm,
        cpuid: tuple[CpuidRecord, ...],
    ) -> None:
        """Describe a machine that stands still, and begin to write it; what fails is told later.

        `cpuid` is what this host's processor shows to such a guest.
        """
        try:
            saved = save(machine)
            state = states.encode(State(saved.parts, saved.blobs))
            manifest = _manifest(machine, spec, command, len(state), cpuid)
        except (VmmError, OSError) as err:
            failure = err
            self._loop.call_soon(lambda: self._end(failure))
            return
        self._thread = threading.Thread(
            target=self._write, args=(machine, manifest, state), name="sending"
        )
        self._thread.start()

    def cancel(self) -> None:
        """Write no more, if it is not too late."""
        if self._cancel_fd >= 0:
            os.eventfd_write(self._cancel_fd, 1)

    def abandon(self) -> None:
        """Write no more, and wait until nothing is written; the loop does not run any more."""
        self.cancel()
        if self._thread:
            self._thread.join()

    def _write(self, machine: "Machine", manifest: Manifest, state: bytes) -> None:
        failure: VmmError | OSError | None = None
        try:
            write_stream(self._sink, manifest, state, machine.memory)
            self._sink.finish()
        except (VmmError, OSError) as err:
            failure = err
        self._loop.call_soon(lambda: self._end(failure))

    def _end(self, failure: "VmmError | OSError | None") -> None:
        self._sink.close()
        os.close(self._cancel_fd)
        self._cancel_fd = -1
        self._on_end(failure)


def _manifest(
    machine: "Machine",
    spec: VmSpec,
    command: SendVm,
    state_size: int,
    cpuid: tuple[CpuidRecord, ...],
) -> Manifest:
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
    )


def _disks(spec: VmSpec) -> Iterable[Disk]:
    for disk in spec.disks:
        option = disk.option
        if disk.scratch is not None:
            raise SnapshotError(f"{option.path}: a throw-away disk stays with its VM")
        # What was found out once is not found out again, from what the guest has written since.
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
