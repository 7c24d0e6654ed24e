"""A front-end's requests to a vhost-user server, one method for each.

Each waits for its answer, if the server gives one, and not longer than `REPLY_TIMEOUT_S`. After any
failure the connection is useless: close it.

Source: QEMU docs/interop/vhost-user.
"""

import os
import socket
from collections.abc import Sequence
from typing import Self

from vmm_kvm.virtio.vhost_user.channel import Channel
from vmm_kvm.virtio.vhost_user.messages import (
    CONFIG_MAX,
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    QUEUES_MAX,
    VRING_NO_FD,
    ConfigAccess,
    ImageChange,
    ImageCopy,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VhostUserError,
    VringAddress,
    VringState,
    pack_log,
    pack_regions,
    pack_u64,
    request_name,
    unpack_u64,
)

REPLY_TIMEOUT_S = 30.0
"""How long a server may take for the requests that a ring has before it stops."""
WANTED = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
)


class Client:
    """The front-end's side of a connection; a context manager. One thread at a time.

    Every method raises VhostUserError when the server breaks the protocol, refuses, goes away, or
    does not answer in time.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of `sock`, which is connected, and negotiate the protocol."""
        sock.settimeout(REPLY_TIMEOUT_S)
        self._channel = Channel(sock)
        self._protocol_features = ProtocolFeature(0)
        try:
            self.features = unpack_u64(self._query(Request.GET_FEATURES))
            """The server's features, a mask of virtio features."""
            if self.features & FEATURE_PROTOCOL_FEATURES:
                offered = unpack_u64(self._query(Request.GET_PROTOCOL_FEATURES))
                wanted = WANTED & ProtocolFeature(offered)
                self._order(Request.SET_PROTOCOL_FEATURES, pack_u64(wanted))
                self._protocol_features = wanted
            self._order(Request.SET_OWNER)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor: it hangs up when the server goes away."""
        return self._channel.fileno()

    def shut_down(self) -> None:
        """End the connection without closing its descriptor, on which others wait."""
        try:
            self._channel.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the server was faster
            return

    # The device

    def queue_count(self) -> int:
        """Return how many queues the server has; 1 if it cannot tell."""
        if not self._protocol_features & ProtocolFeature.MQ:
            return 1
        count = unpack_u64(self._query(Request.GET_QUEUE_NUM))
        if not 0 < count <= QUEUES_MAX:
            raise VhostUserError(f"GET_QUEUE_NUM: {count} queues")
        return count

    def config(self, size: int) -> bytes:
        """Return the first `size` bytes, at most 256, of the configuration space."""
        if not self._protocol_features & ProtocolFeature.CONFIG:
            raise VhostUserError("the server has no configuration space")
        asked = ConfigAccess(0, 0, bytes(min(size, CONFIG_MAX)))
        answer = ConfigAccess.unpack(self._query(Request.GET_CONFIG, asked.pack()))
        if answer.offset or len(answer.data) != len(asked.data):
            raise VhostUserError("GET_CONFIG: another piece than was asked for")
        return answer.data

    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space, as the driver did."""
        self._order(Request.SET_CONFIG, ConfigAccess(offset, 0, data).pack())

    def status(self) -> int:
        """Return the status of a server of ours: a device status, and see HALT_SHIFT."""
        return unpack_u64(self._query(Request.GET_STATUS))

    def ping(self) -> None:
        """Return when the server has processed its connection's messages."""
        self._query(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """Tell which virtio features the driver accepted."""
        if self._has_protocol_features:
            features |= FEATURE_PROTOCOL_FEATURES
        self._order(Request.SET_FEATURES, pack_u64(features))

    def set_log(self, size: int, fd: int) -> None:
        """Share a log of `size` bytes, in which the server marks its writes on request.

        The server has FEATURE_LOG_ALL, and `has_log`; the descriptor stays the caller's.
        """
        self._query(Request.SET_LOG_BASE, pack_log(size, 0), (fd,))

    @property
    def has_log(self) -> bool:
        """Whether the server can mark its writes."""
        has_memory = bool(self._protocol_features & ProtocolFeature.LOG_SHMFD)
        return has_memory and bool(self.features & FEATURE_LOG_ALL)

    def lend(self, is_lent: bool) -> bool:
        """Have a server of ours lend its resource to another process, or take it back.

        Returns whether it has.
        """
        return not unpack_u64(self._query(Request.LEND, pack_u64(is_lent)))

    def set_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Share guest memory: at most 8 regions, and for each the descriptor of its file."""
        self._order(Request.SET_MEM_TABLE, pack_regions(regions), fds)

    # Rings

    def set_size(self, ring: int, size: int) -> None:
        """Set how many descriptors a ring has."""
        self._order(Request.SET_VRING_NUM, VringState(ring, size).pack())

    def set_base(self, ring: int, base: int) -> None:
        """Set where in the available ring the server begins."""
        self._order(Request.SET_VRING_BASE, VringState(ring, base).pack())

    def set_address(self, address: VringAddress) -> None:
        """Set where the parts of a ring lie, in user addresses."""
        self._order(Request.SET_VRING_ADDR, address.pack())

    def set_call(self, ring: int, fd: int | None) -> None:
        """Set the descriptor that the server writes to interrupt; it stays the caller's."""
        self._set_fd(Request.SET_VRING_CALL, ring, fd)

    def set_error(self, ring: int, fd: int | None) -> None:
        """Set the descriptor that the server writes when a ring is broken."""
        self._set_fd(Request.SET_VRING_ERR, ring, fd)

    def set_kick(self, ring: int, fd: int | None) -> None:
        """Start a ring: it is notified by `fd`, which stays the caller's, or polled."""
        self._set_fd(Request.SET_VRING_KICK, ring, fd)

    def enable(self, ring: int, is_enabled: bool) -> None:
        """Let the server serve a ring, or not; without protocol features all are enabled."""
        if self._has_protocol_features:
            self._order(Request.SET_VRING_ENABLE, VringState(ring, is_enabled).pack())

    def stop(self, ring: int) -> int:
        """Stop a ring; returns its server's next position in the available ring.

        Guest memory is not touched for it any more when this returns.
        """
        asked = VringState(ring, 0)
        state = VringState.unpack(self._query(Request.GET_VRING_BASE, asked.pack()))
        if state.ring != ring:
            raise VhostUserError(f"GET_VRING_BASE: ring {state.ring}, not {ring}")
        return state.num

    def copy_image(self, fd: int, part: ImageCopy) -> None:
        """Have a part of a disk copied into the file at `fd`; only for servers of ours.

        Raises:
            OSError: the server cannot read or write it.
            VhostUserError: the connection failed.
        """
        number = unpack_u64(self._query(Request.COPY_IMAGE, part.pack(), [fd]))
        if number:
            raise OSError(number, os.strerror(number))

    def log_changes(self, *, is_on: bool) -> None:
        """Have the changes of a disk marked, or no more; only for servers of ours.

        Raises:
            VhostUserError: the connection failed.
        """
        unpack_u64(self._query(Request.LOG_CHANGES, pack_u64(is_on)))

    def copy_changes(self, fd: int) -> ImageChange:
        """Have the next changed part of a disk copied into the file at `fd`.

        Raises:
            OSError: the server cannot read or write it.
            VhostUserError: the connection failed.
        """
        change = ImageChange.unpack(self._query(Request.COPY_CHANGES, b"", [fd]))
        if change.error:
            raise OSError(change.error, os.strerror(change.error))
        return change

    @property
    def _has_protocol_features(self) -> bool:
        return bool(self.features & FEATURE_PROTOCOL_FEATURES)

    def _set_fd(self, request: Request, ring: int, fd: int | None) -> None:
        if fd is None:
            self._order(request, pack_u64(ring | VRING_NO_FD))
        else:
            self._order(request, pack_u64(ring), [fd])

    # The exchange

    def _order(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no reply of its own; wait until it is done, if that shows."""
        if not self._protocol_features & ProtocolFeature.REPLY_ACK:
            self._send(request, payload, 0, fds)
            return
        self._send(request, payload, FLAG_NEED_REPLY, fds)
        if unpack_u64(self._reply(request)):
            raise VhostUserError(f"{request.name}: the server refuses it")

    def _query(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a request and return the payload of its reply."""
        self._send(request, payload, 0, fds)
        return self._reply(request)

    def _send(self, request: Request, payload: bytes, flags: int, fds: Sequence[int]) -> None:
        try:
            self._channel.send(request, payload, flags=flags, fds=fds)
        except OSError as err:
            raise _broken(request, err) from err

    def _reply(self, request: Request) -> bytes:
        try:
            message = self._channel.receive()
        except OSError as err:
            raise _broken(request, err) from err
        if message is None:
            raise VhostUserError(f"{request.name}: the server closed the connection")
        with message.fds as fds:
            if message.request != request or not message.flags & FLAG_REPLY or fds:
                raise VhostUserError(
                    f"{request.name}: the answer is of {request_name(message.request)}"
                )
        return message.payload


def _broken(request: Request, err: OSError) -> VhostUserError:
    reason = "no answer" if isinstance(err, TimeoutError) else err.strerror
    return VhostUserError(f"{request.name}: {reason}")
