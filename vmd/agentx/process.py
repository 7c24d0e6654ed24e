"""The agentx process: it answers the host's SNMP agent from the parent's reports of VMs.

The parent opens the connection, since this process has no files. It answers one request at a time
and reads no other until the answer is sent, so the master cannot make this process or the parent
hold more. After any failure it soon connects again.

Source: RFC 2741; section 13 of OpenBSD's behaviour.
"""

import os
from collections.abc import Callable
from typing import Protocol, assert_never

from vmd.agentx.mib import REGION, Mib
from vmd.agentx.pdu import (
    HEADER_SIZE,
    CloseReason,
    Header,
    PduError,
    PduType,
    Request,
    Response,
    Status,
    close_unit,
    open_unit,
    parse,
    parse_header,
    register_unit,
    response_unit,
)
from vmd.shared import log as logging
from vmd.wire.agentx import (
    AgentxToParent,
    AskVms,
    Connect,
    Connected,
    NotConnected,
    ParentToAgentx,
    SetSession,
    VmRow,
    VmTable,
)
from vmd.wire.channel import Fds, Received
from vmd.wire.internal import SetVerbosity
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

RETRY_S = 3
"""Between two attempts to connect. Source: section 13 of OpenBSD's behaviour."""
PATIENCE_S = 10
"""How long the master may take to answer, or to read an answer."""
SOFTWARE = "vmm-kvm"
_NAME = b"vmd"
_MASTER_WAITS_S = 5
_READ_SIZE = 16 << 10
_SETS = {
    PduType.TEST_SET: Status.NOT_WRITABLE,
    PduType.COMMIT_SET: Status.COMMIT_FAILED,
    PduType.UNDO_SET: Status.UNDO_FAILED,
}


class ToParent(Protocol):
    """The channel to the parent."""

    def send(self, message: AgentxToParent) -> None:
        """Send a message."""


class _Connection:
    """A connection to the master agent: whole units in, bytes out. Owns its descriptor."""

    def __init__(
        self,
        loop: EventLoop,
        fd: int,
        on_unit: Callable[[Header, bytes], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Begin to read; `on_end` is called once, unless it is closed before."""
        self._loop = loop
        self._fd = fd
        self._on_unit = on_unit
        self._on_end = on_end
        self._in = bytearray()
        self._out = b""
        self._is_held = False
        self._is_open = True
        self._timer = loop.timer(lambda: self._end("it does not read"))
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._read)

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self._is_open:
            self._is_open = False
            self._timer.cancel()
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            os.close(self._fd)

    def hold(self) -> None:
        """Take no more units until `release`."""
        self._is_held = True
        self._loop.remove_reader(self._fd)

    def release(self) -> None:
        """Continue soon, once all output is written."""
        self._is_held = False
        self._loop.call_soon(self._go_on)

    def send(self, data: bytes) -> None:
        """Write as much as there is room for and the rest later; read no unit before that."""
        self._out += data
        self._write()
        if self._out and self._is_open:
            self._loop.remove_reader(self._fd)
            self._loop.add_writer(self._fd, self._write_on)
            self._timer.arm(self._loop.monotonic_ns() + PATIENCE_S * NANOSECONDS)

    def _write_on(self) -> None:
        self._write()
        if self._is_open and not self._out:
            self._timer.cancel()
            self._loop.remove_writer(self._fd)
            self._go_on()

    def _write(self) -> None:
        try:
            self._out = self._out[os.write(self._fd, self._out) :]
        except BlockingIOError:
            return
        except OSError as err:
            self._end(err.strerror or str(err))

    def _go_on(self) -> None:
        if self._is_open and not self._is_held and not self._out:
            self._loop.add_reader(self._fd, self._read)
            self._take_units()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError as err:
            self._end(err.strerror or str(err))
            return
        if not data:
            self._end("it has closed the connection")
            return
        self._in += data
        self._take_units()

    def _take_units(self) -> None:
        try:
            while self._is_open and not self._is_held and not self._out:
                if len(self._in) < HEADER_SIZE:
                    return
                header = parse_header(self._in)
                end = HEADER_SIZE + header.payload_size
                if len(self._in) < end:
                    return
                payload = bytes(self._in[HEADER_SIZE:end])
                del self._in[:end]
                self._on_unit(header, payload)
        except PduError as err:
            self._end(str(err))

    def _end(self, why: str) -> None:
        if self._is_open:
            self.close()
            self._on_end(why)


class Agentx:
    """The agentx process's work, on the event loop's thread."""

    def __init__(
        self, loop: EventLoop, parent: ToParent, version: str, retry_s: float = RETRY_S
    ) -> None:
        """Begin without a session; `version` is this program's in the MIB."""
        self._loop = loop
        self._parent = parent
        self._version = version
        self._retry_s = retry_s
        self._path = ""
        self._context = b""
        self._connection: _Connection | None = None
        self._is_connecting = False
        self._session: int | None = None
        self._is_registered = False
        self._packet = 0
        self._asked: Request | None = None
        self._has_question = False
        self._rows: list[VmRow] = []
        self._complaint = ""
        self._retry = loop.timer(self._connect)
        self._patience = loop.timer(lambda: self._lost("it does not answer"))

    def close(self) -> None:
        """Close the session with the master."""
        self._path = ""
        self._retry.cancel()
        if self._connection and self._session is not None:
            self._connection.send(
                close_unit(self._session, self._next_packet(), CloseReason.SHUTDOWN)
            )
        self._forget()

    def take(self, received: Received[ParentToAgentx]) -> None:
        """Obey a message."""
        with received.fds as fds:
            match received.message:
                case SetSession(path=path, context=context):
                    self._set_session(path, context.encode())
                case Connected():
                    self._connected(fds)
                case NotConnected(message=message):
                    self._is_connecting = False
                    self._lost(message)
                case VmTable(rows=rows, has_more=has_more):
                    self._told(rows, has_more=has_more)
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case _:
                    assert_never(received.message)

    # The connection

    def _set_session(self, path: str, context: bytes) -> None:
        if (path, context) == (self._path, self._context):
            return
        self.close()
        self._path, self._context = path, context
        self._complaint = ""
        if path:
            self._connect()

    def _connect(self) -> None:
        if self._path and not self._is_connecting:
            self._is_connecting = True
            self._parent.send(Connect())

    def _connected(self, fds: Fds) -> None:
        self._is_connecting = False
        if fds.are_lost:
            self._lost("no descriptors left")
            return
        if not self._path:  # it was told otherwise meanwhile
            return
        self._forget()
        self._connection = _Connection(self._loop, fds.take(0), self._take_unit, self._lost)
        self._connection.send(open_unit(self._next_packet(), _NAME, _MASTER_WAITS_S))
        self._wait_for_master()

    def _wait_for_master(self) -> None:
        self._patience.arm(self._loop.monotonic_ns() + PATIENCE_S * NANOSECONDS)

    def _next_packet(self) -> int:
        self._packet = (self._packet + 1) & 0xFFFF_FFFF
        return self._packet

    def _forget(self) -> None:
        self._patience.cancel()
        connection, self._connection = self._connection, None
        if connection:
            connection.close()
        self._session, self._is_registered, self._asked = None, False, None

    def _lost(self, why: str) -> None:
        """Note that there is no usable connection; try again later."""
        self._forget()
        if not self._path:
            return
        tell = log.debug if why == self._complaint else log.warning
        self._complaint = why
        tell("%s: %s: trying again every %g s", self._path, why, self._retry_s)
        self._retry.arm(self._loop.monotonic_ns() + int(self._retry_s * NANOSECONDS))

    # Messages of the master

    def _take_unit(self, header: Header, payload: bytes) -> None:
        if header.type == PduType.CLOSE:
            self._lost("it has closed the session")
            return
        unit = parse(header, payload)
        if isinstance(unit, Response):
            self._take_response(unit)
        elif isinstance(unit, Request):
            self._take_request(unit)
        elif header.type in _SETS:
            self._respond(header, _SETS[PduType(header.type)], 1)
        elif header.type != PduType.CLEANUP_SET:  # which wants no answer
            raise PduError(f"a unit of type {header.type}")

    def _take_response(self, response: Response) -> None:
        if response.header.packet != self._packet or self._is_registered or not self._connection:
            return
        if response.status != Status.NONE:
            what = "open a session" if self._session is None else "register"
            self._lost(f"it refuses to {what}: error {response.status}")
        elif self._session is None:
            self._session = response.header.session
            unit = register_unit(self._session, self._next_packet(), self._context, REGION)
            self._connection.send(unit)
        else:
            self._patience.cancel()
            self._is_registered = True
            self._complaint = ""
            log.info("%s: connected", self._path)

    def _respond(self, header: Header, status: Status, index: int = 0) -> None:
        if self._connection:
            self._connection.send(response_unit(header, (), status, index))

    def _take_request(self, request: Request) -> None:
        if request.header.session != self._session or not self._connection:
            self._respond(request.header, Status.NOT_OPEN)
        elif request.context != self._context:
            self._respond(request.header, Status.UNSUPPORTED_CONTEXT)
        else:
            self._asked = request
            self._connection.hold()
            self._ask()

    # Messages of the parent

    def _ask(self) -> None:
        # The answer to a question of a former session serves this one too.
        if not self._has_question:
            self._has_question = True
            self._rows = []
            self._parent.send(AskVms())

    def _told(self, rows: tuple[VmRow, ...], *, has_more: bool) -> None:
        self._rows += rows
        if has_more:
            return
        self._has_question = False
        found, self._rows = self._rows, []
        request, self._asked = self._asked, None
        if request and self._connection:
            mib = Mib(SOFTWARE, self._version, found)
            connection = self._connection
            connection.send(response_unit(request.header, mib.answer(request)))
            connection.release()
