"""The server's side of one connection: a front-end's requests, and the rings that we serve for it.

Everything happens on the event loop's thread, which is the device's thread: requests are answered
between two rounds of service, never during one. A front-end that breaks the protocol loses its
connection; a driver that breaks its ring loses the ring, until the front-end starts it again.

In-flight tracking is not offered: rings are served in order and a request is given back before the
next is begun, so after a crash the used index says where to go on, and a repeated request does no
harm.

Source: QEMU docs/interop/vhost-user.
"""

import errno
import os
from collections.abc import Callable

from vmm_kvm.errors import GuestError, HaltError, VmmError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.virtio.abi import (
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_NET,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from vmm_kvm.virtio.device import (
    ActiveBackend,
    Backend,
    CopyingBackend,
    LendingBackend,
    MirroredBackend,
    PairedBackend,
)
from vmm_kvm.virtio.vhost_user.channel import Channel, Fds, Message
from vmm_kvm.virtio.vhost_user.messages import (
    CONFIG_MAX,
    COPY_MAX,
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HALT_SHIFT,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    ConfigAccess,
    ImageChange,
    ImageCopy,
    ProtocolFeature,
    Request,
    VhostUserError,
    VringAddress,
    VringState,
    pack_u64,
    request_name,
    unpack_log,
    unpack_region,
    unpack_regions,
    unpack_u64,
)
from vmm_kvm.virtio.vhost_user.regions import SLOTS_MAX, Regions
from vmm_kvm.virtio.vhost_user.vring import Vring, prepare_event

log = Log(__name__)

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
RING_FEATURES = (
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
)

_STATUS_MASK = 0xFF
_ROUNDS_MAX = 8
"""Rounds of service for one ring before others, and requests, have their turn."""
_POLL_NS = 1_000_000
_FAILURES_LOGGED = 8
"""Per connection: a driver can break its rings as often as it likes."""


class Session:
    """Serves a backend to one front-end until it ends; `close` may end it from our side.

    The backend stays the caller's and is reset at the end.
    """

    def __init__(
        self,
        channel: Channel,
        backend: Backend,
        loop: EventLoop,
        on_end: Callable[[str | None], None],
    ) -> None:
        """Take ownership of `channel`, whose socket does not block.

        `on_end` is called once, on the loop's thread: with one line that says what was wrong, or
        None if the front-end closed the connection.
        """
        self._channel = channel
        self._backend = backend
        self._loop = loop
        self._on_end = on_end
        self._offered = (
            backend.features | RING_FEATURES | FEATURE_PROTOCOL_FEATURES | FEATURE_LOG_ALL
        )
        self._features = 0
        self._protocol_features = ProtocolFeature(0)
        self._status = 0
        self._is_running = False  # between the backend's start() and reset()
        self._is_open = True
        self._failures = 0
        self._regions = Regions()
        self._rings = [Vring(index) for index in range(len(backend.queue_sizes))]
        self._poll_timer = loop.timer(self._poll)
        if isinstance(backend, ActiveBackend):
            backend.attach(self)
        loop.add_reader(channel.fileno(), self._receive)

    def close(self) -> None:
        """End the connection and release everything; idempotent; calls no callback."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._channel.fileno())
        self._poll_timer.cancel()
        for ring in self._rings:
            self._unwatch(ring)
            ring.close()
        self._settle()
        self._regions.clear()
        self._channel.close()

    def _end(self, reason: str | None) -> None:
        if self._is_open:
            self.close()
            self._on_end(reason)

    # The backend's requests (InputTransport)

    def notify(self, index: int) -> None:
        """Have the backend process ring `index` soon; any thread."""
        self._loop.call_soon(lambda: self._serve_again(self._rings[index]))

    def config_changed(self) -> None:
        """Do nothing: the front-end finds out when it asks."""

    def watch(self, fd: int, index: int) -> None:
        """Have the backend process ring `index` whenever input arrives at `fd`."""
        self._loop.add_arrival_reader(fd, lambda: self._serve_again(self._rings[index]))

    def unwatch(self, fd: int) -> None:
        """Stop it."""
        self._loop.remove_reader(fd)

    # Requests

    def _receive(self) -> None:
        try:
            message = self._channel.receive()
        except BlockingIOError:
            return
        except VhostUserError as err:
            self._end(str(err))
            return
        except OSError as err:
            self._end(f"connection: {err.strerror}")
            return
        if message is None:
            self._end(None)
            return
        with message.fds:
            self._answer(message)

    def _answer(self, message: Message) -> None:
        """Execute a message, and reply if it needs a reply."""
        wants_reply = bool(
            message.flags & FLAG_NEED_REPLY and self._protocol_features & ProtocolFeature.REPLY_ACK
        )
        problem = None
        reply = None
        try:
            reply = self._obey(message)
        except VhostUserError as err:
            problem = f"{request_name(message.request)}: {err}"
        if reply is None and wants_reply:
            reply = pack_u64(problem is not None)
        try:
            if reply is not None:
                self._channel.send(message.request, reply, flags=FLAG_REPLY)
        except VhostUserError as err:
            problem = problem or str(err)
        except OSError as err:
            problem = problem or f"connection: {err.strerror}"
        if problem is not None:
            self._end(problem)

    def _obey(self, message: Message) -> bytes | None:
        """Execute a message; returns the payload of its reply."""
        payload, fds = message.payload, message.fds
        if message.flags & FLAG_REPLY:
            raise VhostUserError("a reply, not a request")
        reply = None
        match message.request:
            case Request.GET_FEATURES:
                reply = pack_u64(self._offered)
            case Request.SET_FEATURES:
                self._set_features(unpack_u64(payload))
            case Request.GET_PROTOCOL_FEATURES:
                reply = pack_u64(PROTOCOL_FEATURES)
            case Request.SET_PROTOCOL_FEATURES:
                self._set_protocol_features(unpack_u64(payload))
            case Request.SET_OWNER:
                pass
            case Request.RESET_OWNER | Request.RESET_DEVICE:
                self._reset()
            case Request.GET_QUEUE_NUM:
                # QEMU and DPDK count an interface's queues in pairs.
                is_net = self._backend.device_id == VIRTIO_ID_NET
                reply = pack_u64(len(self._rings) // 2 if is_net else len(self._rings))
            case Request.GET_CONFIG:
                reply = self._config(ConfigAccess.unpack(payload)).pack()
            case Request.SET_CONFIG:
                access = ConfigAccess.unpack(payload)
                if access.flags > 1:  # 1: on migration
                    raise VhostUserError(f"flags {access.flags:#x}")
                self._backend.write_config(access.offset, access.data)
            case Request.GET_STATUS:
                is_failed = any(ring.is_failed for ring in self._rings)
                status = self._status | (VIRTIO_CONFIG_S_NEEDS_RESET * is_failed)
                halted = max(ring.halt_errno for ring in self._rings)
                reply = pack_u64(status | halted << HALT_SHIFT)
            case Request.SET_STATUS:
                self._set_status(unpack_u64(payload))
            case Request.SET_MEM_TABLE:
                self._set_memory(payload, fds)
            case Request.SET_LOG_BASE:
                with Fds([fds.take()]) as taken:
                    self._regions.map_log(*unpack_log(payload), *taken)
                reply = pack_u64(0)  # as libvhost-user answers
            case Request.LEND:
                reply = pack_u64(self._lend(unpack_u64(payload)))
            case Request.GET_MAX_MEM_SLOTS:
                reply = pack_u64(SLOTS_MAX)
            case Request.ADD_MEM_REG:
                self._add_memory(payload, fds)
            case Request.REM_MEM_REG:
                self._suspend()
                self._regions.remove(unpack_region(payload))
                self._resume()
                fds.close()  # some front-ends send one along
            case Request.COPY_IMAGE if isinstance(self._backend, CopyingBackend):
                reply = pack_u64(_copied(self._backend, ImageCopy.unpack(payload), fds.take()))
            case Request.LOG_CHANGES if isinstance(self._backend, MirroredBackend):
                self._backend.log_changes(is_on=bool(unpack_u64(payload)))
                reply = pack_u64(0)
            case Request.COPY_CHANGES if isinstance(self._backend, MirroredBackend):
                reply = _copied_changes(self._backend, fds.take())
            case _:
                reply = self._obey_for_ring(message)
        if fds:
            raise VhostUserError("descriptors that do not belong to it")
        return reply

    def _obey_for_ring(self, message: Message) -> bytes | None:
        """Execute a message about one ring; returns the payload of its reply."""
        payload, fds = message.payload, message.fds
        match message.request:
            case Request.SET_VRING_NUM:
                state = VringState.unpack(payload)
                self._ring(state.ring).set_size(state.num)
            case Request.SET_VRING_BASE:
                state = VringState.unpack(payload)
                self._ring(state.ring).set_base(state.num)
            case Request.GET_VRING_BASE:
                ring = self._ring(VringState.unpack(payload).ring)
                self._unwatch(ring)
                base = ring.stop()
                self._settle()
                return VringState(ring.index, base).pack()
            case Request.SET_VRING_ADDR:
                address = VringAddress.unpack(payload)
                ring = self._ring(address.ring)
                ring.set_address(address)
                self._go_on(ring)
            case Request.SET_VRING_ENABLE:
                state = VringState.unpack(payload)
                if state.num > 1:
                    raise VhostUserError(f"ring {state.ring}: {state.num}, not 0 or 1")
                self._set_enabled(self._ring(state.ring), bool(state.num))
            case Request.SET_VRING_KICK:
                self._set_kick(*self._ring_and_fd(payload, fds))
            case Request.SET_VRING_CALL:
                ring, fd = self._ring_and_fd(payload, fds)
                ring.set_call(fd)
            case Request.SET_VRING_ERR:
                ring, fd = self._ring_and_fd(payload, fds)
                ring.set_error(fd)
            case _:
                raise VhostUserError("is not supported")
        return None

    def _set_features(self, features: int) -> None:
        if features & ~self._offered:
            raise VhostUserError(f"{features & ~self._offered:#x} was not offered")
        virtio = features & ~(FEATURE_PROTOCOL_FEATURES | FEATURE_LOG_ALL)
        if virtio != self._features and self._is_running:
            raise VhostUserError("changed while a ring is started")
        self._features = virtio
        self._regions.log_writes(is_on=bool(features & FEATURE_LOG_ALL))
        if not features & FEATURE_PROTOCOL_FEATURES:
            for ring in self._rings:
                self._set_enabled(ring, True)

    def _set_protocol_features(self, features: int) -> None:
        if features & ~PROTOCOL_FEATURES:
            raise VhostUserError(f"{features & ~PROTOCOL_FEATURES:#x} was not offered")
        self._protocol_features = ProtocolFeature(features)

    def _set_status(self, status: int) -> None:
        if status & ~_STATUS_MASK:
            raise VhostUserError(f"{status:#x}")
        self._status = status
        if status == 0:
            self._reset()

    def _lend(self, is_lent: int) -> bool:
        """Release the device's resource, with every ring stopped, or take it back.

        Returns whether that could not be: then all is as it was.
        """
        if is_lent > 1 or not isinstance(self._backend, LendingBackend):
            raise VhostUserError("is not supported")
        if self._is_running:
            raise VhostUserError("a ring is started")
        try:
            if is_lent:
                self._backend.let_go()
            else:
                self._backend.take_back()
        except (VmmError, OSError) as err:
            log.warning("%s", err)
            return True
        return False

    def _config(self, access: ConfigAccess) -> ConfigAccess:
        """Return a piece of configuration space; zeros after the device type's part."""
        space = self._backend.config().ljust(CONFIG_MAX, b"\0")
        piece = space[access.offset : access.offset + len(access.data)]
        return access._replace(data=piece)

    def _reset(self) -> None:
        """Stop and forget every ring, and the backend's requests."""
        for ring in self._rings:
            self._unwatch(ring)
            ring.stop()
            ring.reset()
        self._settle()
        self._features = self._status = 0
        self._regions.log_writes(is_on=False)

    # Memory

    def _set_memory(self, payload: bytes, fds: Fds) -> None:
        regions = unpack_regions(payload)
        if len(fds) != len(regions):
            raise VhostUserError(f"{len(fds)} descriptors for {len(regions)} regions")
        self._suspend()
        self._regions.clear()
        for region, fd in zip(regions, fds, strict=True):
            self._regions.add(region, fd)
        fds.close()
        self._resume()

    def _add_memory(self, payload: bytes, fds: Fds) -> None:
        region = unpack_region(payload)
        with Fds([fds.take()]) as taken:
            self._regions.add(region, *taken)
        self._resume()

    def _suspend(self) -> None:
        for ring in self._rings:
            ring.suspend()

    def _resume(self) -> None:
        """Go on with the rings whose memory is there; others wait for theirs."""
        for ring in self._rings:
            if self._may_run(ring) and ring.is_in(self._regions):
                self._go_on(ring)

    # Rings

    def _ring(self, index: int) -> Vring:
        if index >= len(self._rings):
            raise VhostUserError(f"ring {index}: there are {len(self._rings)}")
        return self._rings[index]

    def _ring_and_fd(self, payload: bytes, fds: Fds) -> tuple[Vring, int | None]:
        """Return the ring and the descriptor in a message; the caller owns the descriptor."""
        value = unpack_u64(payload)
        if value & ~(VRING_INDEX_MASK | VRING_NO_FD):
            raise VhostUserError(f"{value:#x}")
        ring = self._ring(value & VRING_INDEX_MASK)
        if value & VRING_NO_FD:
            return ring, None
        for fd in fds:
            prepare_event(fd)
        return ring, fds.take()

    def _set_kick(self, ring: Vring, fd: int | None) -> None:
        """Start a ring."""
        self._unwatch(ring)
        ring.suspend()
        if fd is None:
            ring.set_polled()
            self._poll_timer.arm(self._loop.monotonic_ns() + _POLL_NS)
        else:
            ring.set_kick(fd)
            ring.take_kick()  # what does not work as an event shows here
            if not self._loop.add_reader(fd, lambda: self._kicked(ring)):
                raise VhostUserError(f"ring {ring.index}: kick descriptor: cannot be waited for")
        self._go_on(ring)

    def _set_enabled(self, ring: Vring, is_enabled: bool) -> None:
        ring.is_enabled = is_enabled
        if is_enabled:
            self._go_on(ring)
        else:
            ring.suspend()
        self._tell_serving()

    def _tell_serving(self) -> None:
        if self._is_running and isinstance(self._backend, PairedBackend):
            self._backend.serving([ring.index for ring in self._rings if ring.is_enabled])

    def _unwatch(self, ring: Vring) -> None:
        if ring.kick_fd is not None:
            self._loop.remove_reader(ring.kick_fd)

    @staticmethod
    def _may_run(ring: Vring) -> bool:
        return ring.is_started and ring.is_enabled and not ring.is_failed

    def _go_on(self, ring: Vring) -> None:
        """Serve a ring if it is started and enabled, at once: a notification may have been lost."""
        if not self._may_run(ring) or ring.queue is not None:
            return
        try:
            ring.resume(self._regions, self._features)
        except GuestError as err:
            self._fail(ring, err)
            return
        if not self._is_running:
            self._is_running = True
            self._backend.start(self._features)
            self._tell_serving()
        # Interrupt the driver, in case a predecessor gave chains back without doing so.
        ring.interrupt()
        self._serve(ring)

    def _settle(self) -> None:
        """Reset the backend when no ring is started any more."""
        if self._is_running and not any(ring.is_started for ring in self._rings):
            self._is_running = False
            self._backend.reset()

    def _kicked(self, ring: Vring) -> None:
        try:
            if ring.take_kick():
                self._serve(ring)
        except VhostUserError as err:
            self._end(str(err))

    def _poll(self) -> None:
        polled = [ring for ring in self._rings if ring.is_polled]
        try:
            for ring in polled:
                self._serve(ring)
        except VhostUserError as err:
            self._end(str(err))
            return
        if polled:
            self._poll_timer.arm(self._loop.monotonic_ns() + _POLL_NS)

    def _serve(self, ring: Vring) -> None:
        """Serve a ring's available chains, but leave others their turn."""
        queue = ring.queue
        if queue is None:
            return
        ring.halt_errno = 0
        try:
            for _ in range(_ROUNDS_MAX):
                queue.disable_kicks()
                self._backend.process(ring.index, queue)
                if queue.needs_interrupt():
                    ring.interrupt()
                if queue.is_streaming:
                    os.sched_yield()  # as a worker in the VM's process does
                if not queue.enable_kicks():
                    return
        except HaltError as err:  # nothing is served before the next notification
            ring.halt(err.errno)
            return
        except GuestError as err:
            self._fail(ring, err)
            return
        self._loop.call_soon(lambda: self._serve_again(ring))

    def _serve_again(self, ring: Vring) -> None:
        try:
            self._serve(ring)
        except VhostUserError as err:
            self._end(str(err))

    def _fail(self, ring: Vring, err: GuestError) -> None:
        """Give up a ring that the driver broke, and report it through the error descriptor."""
        self._failures += 1
        if self._failures <= _FAILURES_LOGGED:
            log.warning("ring %d: %s", ring.index, str(err))
        ring.fail()


def _copied(backend: CopyingBackend, part: ImageCopy, fd: int) -> int:
    """Copy a part of a disk; returns 0, or the number of the error."""
    try:
        if part.size > COPY_MAX:
            return errno.EINVAL
        backend.copy_image(fd, *part)
    except OSError as err:
        return err.errno or errno.EIO
    finally:
        os.close(fd)
    return 0


def _copied_changes(backend: MirroredBackend, fd: int) -> bytes:
    """Copy the next changed part of a disk; returns the reply."""
    try:
        return ImageChange(0, *backend.copy_changes(fd)).pack()
    except OSError as err:
        return ImageChange(err.errno or errno.EIO, 0, 0, 0, 0).pack()
    finally:
        os.close(fd)
