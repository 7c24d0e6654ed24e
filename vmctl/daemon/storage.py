"""`vmctl receive --live --copy-storage`: a VM from another host, with the disks that are not here.

What comes by standard input is divided here: the machine's stream goes on to the daemon, and the
disks go into new images, made with the rights and limits of this command's user. They have no names
before the sender has let go of the VM, and the daemon's process of a disk waits for its lock until
then. What the daemon tells the sender passes through here as well: that all has arrived is true
only with the disks.

    standard input ── frames ─┬─ disks ──▶ new images
                              └─ stream ──▶ pipe ──▶ VM process
    standard output ◀── lines ── here ◀── pipe ◀── VM process
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from vmctl.client import Client, CommandError, Fields, RefusedError
from vmctl.daemon.starting import say_started, why_not_started
from vmctl.daemon.transfer import SENDER_PATIENCE_S, check_disks, request_of
from vmctl.messages import fail
from vmctl.signals import cleaning_up
from vmm_kvm.block.image import Format, StoredImage
from vmm_kvm.block.locks import unlock
from vmm_kvm.errors import SnapshotError, VmmError
from vmm_kvm.images.create import new_image
from vmm_kvm.images.opening import open_image
from vmm_kvm.new_file import NewFile
from vmm_kvm.snapshot.fds import FdSource
from vmm_kvm.snapshot.handover import GO, READY, RUNNING, failed, wanted_disks
from vmm_kvm.snapshot.manifest import Disk, Manifest
from vmm_kvm.snapshot.storage import DiskPart, StorageReader
from vmm_kvm.snapshot.stream import StreamReader

_STDIN, _STDOUT = 0, 1
_FLUSH_SIZE = 32 << 20
"""Bytes of disks that are made durable at once: the last ones, while the VM stands still, are few.
"""
_LINE_MAX = 1024
_PATIENCE_S = 60.0
_FAILED = failed("").rstrip()


def receive_with_storage(name: str, *, stays_paused: bool) -> int:
    """Receive a VM from standard input; returns the exit status."""
    try:
        with cleaning_up(), FdSource(os.dup(_STDIN), SENDER_PATIENCE_S) as source:
            frames = StorageReader(source)
            reader = StreamReader(frames)
            source.wait_at_most(_PATIENCE_S)
            with Arrival(frames, _STDOUT) as arrival:
                try:
                    answer = _arrive(arrival, reader, name, stays_paused=stays_paused)
                except CommandError as err:
                    why = why_not_started(err) if isinstance(err, RefusedError) else str(err)
                    return fail(arrival.fail(why))
                arrival.finish()
    except OSError as err:
        return fail(f"standard input: {err.strerror}")
    except SnapshotError as err:
        return fail(f"standard input: {err}")
    say_started(answer)
    return 0


def _arrive(arrival: "Arrival", reader: StreamReader, name: str, *, stays_paused: bool) -> Fields:
    """Have the daemon run the VM; returns its answer.

    Raises:
        CommandError: it does not run.
    """
    fds: list[int] = []
    try:
        copied = arrival.choose(reader.manifest)
        fds += arrival.begin()
        fields = {
            **request_of(reader.manifest, fds, copied=copied),
            "name": name,
            "stream": 0,
            "replies": 1,
            "manifest": reader.text.decode(),
            "stays_paused": stays_paused,
        }
        check_disks(reader.manifest, fields, fds)
        with Client() as client:
            client.send("receive", fields, fds)
            while fds:  # the ends of pipes are the daemon's alone
                os.close(fds.pop())
            return client.receive("started")[0]
    finally:
        for fd in fds:
            os.close(fd)


class _NewDisk:
    """A disk that is being copied."""

    def __init__(self, new: NewFile, image: StoredImage, path: str) -> None:
        self.new, self.image, self.path = new, image, path
        self.is_published = False
        self._unflushed = 0

    def write(self, part: DiskPart) -> None:
        """Write a part of it."""
        if part.data is not None:
            self.image.writev(part.offset, [part.data])
            self._unflushed += part.size
        elif not self.image.reads_zero(part.offset, part.size):
            self.image.write_zeroes(part.offset, part.size, may_unmap=True)
        if self._unflushed >= _FLUSH_SIZE:
            self.image.flush()
            self._unflushed = 0

    def complete(self) -> None:
        """Make all of it durable; nothing is written any more."""
        self.image.flush()
        self.image.close()

    def publish(self) -> None:
        """Give it its name, and leave it to the daemon's process."""
        self.new.publish(durable=False)
        self.is_published = True
        directory = os.open(Path(self.path).parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        unlock(self.new.fd)

    def withdraw(self) -> None:
        """Take its name away again."""
        if self.is_published:
            with suppress(OSError):  # somebody else has
                path = Path(self.path)
                if os.path.samestat(path.lstat(), os.fstat(self.new.fd)):
                    path.unlink()
            self.is_published = False


class Arrival:
    """Disks that arrive beside a machine's stream; a context manager, which leaves no half of one.

    Between `begin` and the end of the block two threads divide what comes, and pass on what the
    daemon says.
    """

    def __init__(self, frames: StorageReader, out: int) -> None:
        """Divide `frames`; the sender hears by the descriptor `out`. Both stay the caller's."""
        self._frames, self._out = frames, out
        self._disks: dict[int, _NewDisk] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()  # over what is said, and what has a name
        self._are_disks_done = threading.Event()
        self._is_ready_said = self._has_let_go = self._is_over = False
        self._problem: str | None = None
        self._passing: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Begin with no disk."""
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            if not self._has_let_go:  # a signal ends this command
                self._say(failed("vmctl receive has ended"))
                self._is_over = True
        self._stack.close()

    def choose(self, manifest: Manifest) -> Mapping[int, int]:
        """Make images for the disks that are not here; returns descriptors of them, by place.

        They stay this object's. The sender is told.

        Raises:
            CommandError: one cannot be made.
        """
        found = {}
        sizes = self._sizes(manifest)
        for place, (disk, size) in enumerate(zip(manifest.disks, sizes, strict=True)):
            if size and disk.path.startswith("/") and not os.path.lexists(disk.path):
                found[place] = self._make(place, disk, size)
        self._frames.want(found.keys())
        with suppress(OSError):  # the sender is gone, as shows when it is read
            os.write(self._out, wanted_disks(found))
        return found

    def _sizes(self, manifest: Manifest) -> list[int]:
        sizes = self._frames.sizes
        if len(sizes) != len(manifest.disks):
            raise CommandError("standard input: disks: not those of the manifest")
        return sizes

    def _make(self, place: int, disk: Disk, size: int) -> int:
        try:
            kind = Format(disk.kind)
            new = self._stack.enter_context(new_image(disk.path, kind, size))
            image = open_image(os.dup(new.fd), kind, False, name=disk.path)
            self._stack.callback(image.close)
            # Of another open file description, which the lock keeps out for now.
            fd = os.open(f"/proc/self/fd/{new.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            raise CommandError(f"disk {disk.path}: {err.strerror}") from err
        except (VmmError, ValueError) as err:
            raise CommandError(f"disk {disk.path}: {err}") from err
        self._stack.callback(os.close, fd)
        self._disks[place] = _NewDisk(new, image, disk.path)
        return fd

    def begin(self) -> tuple[int, int]:
        """Begin to divide; returns descriptors for the daemon: of the stream, and for its answers.

        The caller owns them.
        """
        stream, sink = os.pipe2(os.O_CLOEXEC)
        answers, out = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._divide, args=(sink,), daemon=True).start()
        self._passing = threading.Thread(target=self._pass_on, args=(answers,), daemon=True)
        self._passing.start()
        return stream, out

    def finish(self) -> None:
        """Return when the sender has been told all that the daemon says."""
        if self._passing:
            self._passing.join(_PATIENCE_S)

    def fail(self, why: str) -> str:
        """Tell the sender that its VM does not run here; no disk of it is left.

        Returns the reason: `why`, unless something was wrong before.
        """
        with self._lock:
            self._withdraw()
            why = self._problem or why
            self._say(failed(why.replace("\n", ": ")))
            self._is_over = True
            return why

    def _divide(self, sink: int) -> None:
        """Take frames until the sender has let go, or something is wrong; closes `sink`."""
        try:
            while not self._take_one(sink):
                pass
        except (CommandError, VmmError, OSError) as err:
            text = err.strerror or str(err) if isinstance(err, OSError) else str(err)
            self._fail(text)
        finally:
            self._are_disks_done.set()
            os.close(sink)

    def _take_one(self, sink: int) -> bool:
        """Take a frame; returns whether it is the last one."""
        got = self._frames.next()
        if got is None:
            for disk in self._disks.values():
                _of(disk.path, disk.complete)
            self._are_disks_done.set()
        elif isinstance(got, DiskPart):
            disk = self._disks[got.disk]
            _of(disk.path, lambda: disk.write(got))
        else:
            is_last = self._is_ready_said
            if is_last:
                self._let_go(bytes(got))
            view = got
            while view:
                view = view[os.write(sink, view) :]
            return is_last
        return False

    def _let_go(self, word: bytes) -> None:
        """Give the disks their names, as the VM is this host's now."""
        if word != GO:
            raise CommandError("the sender says something else than to go on")
        with self._lock:
            if self._is_over:
                raise CommandError("it has ended here")
            self._has_let_go = True
            for disk in self._disks.values():
                _of(disk.path, disk.publish)

    def _fail(self, text: str) -> None:
        with self._lock:
            self._problem = self._problem or text
            self._withdraw()
            self._say(failed(text))
            self._is_over = True

    def _withdraw(self) -> None:
        for disk in self._disks.values():
            disk.withdraw()

    def _say(self, line: bytes) -> None:
        if not self._is_over:
            with suppress(OSError):  # the sender is gone: it does not know whether it runs here
                os.write(self._out, line)

    def _pass_on(self, answers: int) -> None:
        """Pass on what the daemon says; closes `answers`."""
        try:
            for line in _lines(answers):
                if line == READY:
                    self._are_disks_done.wait()
                    if not self._frames.are_disks_done:
                        return
                    self._is_ready_said = True
                with self._lock:
                    if line.startswith(_FAILED):
                        self._withdraw()
                    self._say(line)
                    self._is_over |= line == RUNNING or line.startswith(_FAILED)
        finally:
            os.close(answers)


def _of(path: str, write: Callable[[], None]) -> None:
    """Do something with a disk, whose faults name it."""
    try:
        write()
    except OSError as err:
        raise CommandError(f"disk {path}: {err.strerror}") from err


def _lines(fd: int) -> Iterable[bytes]:
    """Yield the lines that come, of which none is long."""
    left = b""
    while piece := os.read(fd, _LINE_MAX):
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line + b"\n"
        left = left[:_LINE_MAX]
