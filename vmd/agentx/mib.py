"""The VM-MIB as OpenBSD's vmd fills it: VMs as variables in the order of their names.

Pure. vmHvUpTime, vmTableLastChange, vmUpTime, the tables of processors, storage and networks, and
notifications are not there.

Source: RFC 7666; section 13 of OpenBSD's behaviour.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice

from vmd.agentx.pdu import Binding, Oid, PduType, Range, Request, Tag, Value
from vmd.wire.agentx import VmRow
from vmd.wire.messages import State

REGION: Oid = (1, 3, 6, 1, 2, 1, 236)
"""vmMIB: the region that the sub-agent registers."""
BINDINGS_MAX = 2048
"""Variables in one response: a GET_BULK for more gets fewer repetitions."""

_SOFTWARE: Oid = (*REGION, 1, 1, 1, 0)
_VERSION: Oid = (*REGION, 1, 1, 2, 0)
_OBJECT_ID: Oid = (*REGION, 1, 1, 3, 0)
_NUMBER: Oid = (*REGION, 1, 2, 0)
_ENTRY: Oid = (*REGION, 1, 4, 1)

_MEMORY_UNIT = 1 << 20
_INTEGER_MAX = (1 << 31) - 1
_ENABLED, _DISABLED = 2, 3
_PERSISTENCE_UNKNOWN = 1
# On OpenBSD a VM that is stopping still counts as running.
_ADMIN_STATES = {State.STARTING: 1, State.RUNNING: 1, State.STOPPING: 1, State.PAUSED: 3}
_OPERATIONAL_STATES = {State.STARTING: 4, State.RUNNING: 4, State.STOPPING: 4, State.PAUSED: 8}
_SHUT_DOWN, _ADMIN_SHUT_DOWN = 11, 4


def _integer(number: int) -> Value:
    return Value(Tag.INTEGER, min(number, _INTEGER_MAX))


def _string(text: str) -> Value:
    return Value(Tag.OCTET_STRING, text.encode("utf-8", "replace"))


def _columns(row: VmRow) -> Iterator[tuple[int, Value]]:
    """Yield a VM's variables by column; the first column, its index, cannot be asked for."""
    vm = row.vm
    processors = _integer(vm.cpus)
    yield 2, _string(vm.name)
    yield 3, _string("")  # UUID
    yield 4, _string("")  # operating system
    yield 5, _integer(_ADMIN_STATES.get(vm.state, _ADMIN_SHUT_DOWN))
    yield 6, _integer(_OPERATIONAL_STATES.get(vm.state, _SHUT_DOWN))
    yield 7, _integer(_ENABLED if row.is_enabled else _DISABLED)
    yield 8, _integer(_PERSISTENCE_UNKNOWN)
    yield from ((column, processors) for column in (9, 10, 11))
    yield 12, _integer(_MEMORY_UNIT)
    yield 13, _integer((vm.memory_used or 0) // _MEMORY_UNIT)
    yield 14, _integer(-1)
    yield 15, _integer(vm.memory // _MEMORY_UNIT)


class Mib:
    """All variables at one moment."""

    def __init__(self, software: str, version: str, rows: Iterable[VmRow]) -> None:
        """Make variables of the VMs' state; `software` and `version` name the hypervisor."""
        rows = tuple(rows)
        values = {
            _SOFTWARE: _string(software),
            _VERSION: _string(version),
            _OBJECT_ID: Value(Tag.OBJECT_IDENTIFIER, (0, 0)),
            _NUMBER: _integer(len(rows)),
        }
        for row in rows:
            for column, value in _columns(row):
                values[*_ENTRY, column, row.vm.id] = value
        self._values = values
        self._names = sorted(values)
        self._objects = {name[:-1] for name in values}

    def get(self, name: Oid) -> Binding:
        """Return one variable."""
        value = self._values.get(name)
        if value is None:
            is_object = name[:-1] in self._objects
            value = Value(Tag.NO_SUCH_INSTANCE if is_object else Tag.NO_SUCH_OBJECT)
        return Binding(name, value)

    def following(self, wanted: Range) -> Binding:
        """Return the first variable in a range."""
        find = bisect_left if wanted.is_included else bisect_right
        at = find(self._names, wanted.start)
        if at < len(self._names) and (not wanted.end or self._names[at] < wanted.end):
            name = self._names[at]
            return Binding(name, self._values[name])
        return Binding(wanted.start, Value(Tag.END_OF_VIEW))

    def answer(self, request: Request) -> list[Binding]:
        """Return the variables that a request names, in its order."""
        if request.header.type == PduType.GET:
            return [self.get(wanted.start) for wanted in request.ranges]
        if request.header.type == PduType.GET_NEXT:
            return [self.following(wanted) for wanted in request.ranges]
        singles, repeated = (
            request.ranges[: request.non_repeaters],
            request.ranges[request.non_repeaters :],
        )
        found = [self.following(wanted) for wanted in singles]
        found += islice(self._repeat(repeated, request.repetitions), BINDINGS_MAX - len(found))
        return found

    def _repeat(self, ranges: tuple[Range, ...], repetitions: int) -> Iterator[Binding]:
        """Yield the next variable of each range in turn, until all ranges are exhausted."""
        for _ in range(repetitions):
            found = [self.following(wanted) for wanted in ranges]
            yield from found
            if all(binding.value.tag is Tag.END_OF_VIEW for binding in found):
                return
            ranges = tuple(
                Range(binding.name, False, wanted.end)
                for binding, wanted in zip(found, ranges, strict=True)
            )
