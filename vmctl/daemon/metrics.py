"""`vmctl metrics`: resource usage of VMs, as OpenMetrics text.

Source: OpenMetrics 1.0; Prometheus' naming: base units, `_total` for what only grows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmctl.client import Client, CommandError, Fields
from vmctl.daemon.status import owner
from vmctl.messages import fail

_NANOSECONDS = 1e9
_NOTHING: Fields = {"disks": (), "streams": (), "exits": ()}


class Sample(NamedTuple):
    """A value with its labels."""

    labels: dict[str, str]
    value: float
    suffix: str = ""


class Family(NamedTuple):
    """A metric: its samples are of one VM, if it has a process."""

    name: str
    kind: str
    help: str
    unit: str
    samples: Callable[[Fields], Iterable[Sample]]


def metrics(_words: Sequence[str] = ()) -> int:
    """Print the metrics of all VMs, and of the daemon, once."""
    try:
        with Client() as client:
            vms = client.vms(statistics=True, interfaces=True)
            totals = client.ask("counts", "totals")
    except CommandError as err:
        return fail(err)
    print("\n".join(lines(vms, totals)))
    return 0


def lines(vms: Sequence[Fields], totals: Fields) -> Iterator[str]:
    """Yield the exposition's lines, the last of them its end."""
    for family in FAMILIES:
        yield from _head(family.name, family.kind, family.unit, family.help)
        for vm in vms:
            for sample in family.samples(vm):
                labels = {"name": vm["name"], "id": str(vm["id"])} | sample.labels
                yield _line(family.name + sample.suffix, labels, sample.value)
    yield from _of_daemon(totals)
    yield "# EOF"


def _head(name: str, kind: str, unit: str, text: str) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    if unit:
        yield f"# UNIT {name} {unit}"
    yield f"# HELP {name} {text}"


def _line(name: str, labels: dict[str, str], value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{told}}} {value}" if told else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _of_daemon(totals: Fields) -> Iterator[str]:
    yield from _head("vmd_starts", "counter", "", "Starts of VMs whose guests ran.")
    yield f"vmd_starts_total {totals['starts']}"
    yield from _head("vmd_failed_starts", "counter", "", "Starts of VMs that failed.")
    yield f"vmd_failed_starts_total {totals['failed_starts']}"
    name = "vmd_start_duration_seconds"
    yield from _head(name, "histogram", "seconds", "From a start to the guest's first step.")
    count = 0
    bounds = [*map(float, totals["start_bounds"]), float("inf")]
    for bound, number in zip(bounds, totals["start_counts"], strict=True):
        count += number
        limit = "+Inf" if bound == float("inf") else repr(bound)
        yield _line(f"{name}_bucket", {"le": limit}, count)
    yield f"{name}_count {count}"
    yield f"{name}_sum {totals['start_seconds']}"


def _info(vm: Fields) -> Iterator[Sample]:
    yield Sample({"owner": owner(vm), "state": vm["state"]}, 1, "_info")


def _limit(vm: Fields) -> Iterator[Sample]:
    yield Sample({}, vm["memory"])


def _processors(vm: Fields) -> Iterator[Sample]:
    yield Sample({}, vm["cpus"])


def _memory(vm: Fields) -> Iterator[Sample]:
    if vm["memory_used"] is not None:
        yield Sample({}, vm["memory_used"])


def _cpu(vm: Fields) -> Iterator[Sample]:
    if vm["statistics"]:
        yield Sample({}, vm["statistics"]["cpu_ns"] / _NANOSECONDS, "_total")


def _disks(field: str) -> Callable[[Fields], Iterator[Sample]]:
    def samples(vm: Fields) -> Iterator[Sample]:
        for disk in (vm["statistics"] or _NOTHING)["disks"]:
            yield Sample({"disk": str(disk["index"])}, disk[field], "_total")

    return samples


def _interfaces(field: str, way: str) -> Callable[[Fields], Iterator[Sample]]:
    def samples(vm: Fields) -> Iterator[Sample]:
        streams = (vm["statistics"] or _NOTHING)["streams"]
        moved = {stream["index"]: stream[way] for stream in streams}
        for index, interface in enumerate(vm["interfaces"]):
            if vm["pid"] is not None:
                value = interface[field] + moved.get(index, 0)
                yield Sample({"interface": str(index)}, value, "_total")

    return samples


def _exits(vm: Fields) -> Iterator[Sample]:
    for exits in (vm["statistics"] or _NOTHING)["exits"]:
        yield Sample({"reason": exits["reason"]}, exits["count"], "_total")


def _available(vm: Fields) -> Iterator[Sample]:
    use = (vm["statistics"] or _NOTHING).get("guest_memory")
    if use and use["available"] is not None:
        yield Sample({}, use["available"])


def _given_back(vm: Fields) -> Iterator[Sample]:
    given_back = (vm["statistics"] or _NOTHING).get("given_back")
    if given_back is not None:
        yield Sample({}, given_back, "_total")


FAMILIES = (
    Family("vmd_vm", "info", "VMs that the daemon knows.", "", _info),
    Family("vmd_vm_processors", "gauge", "Virtual processors.", "", _processors),
    Family("vmd_vm_memory_limit_bytes", "gauge", "Memory that the guest has.", "bytes", _limit),
    Family("vmd_vm_memory_bytes", "gauge", "Memory of the host's in use for it.", "bytes", _memory),
    Family(
        "vmd_vm_guest_memory_available_bytes",
        "gauge",
        "What the guest could have without swapping, as it says.",
        "bytes",
        _available,
    ),
    Family(
        "vmd_vm_memory_given_back_bytes",
        "counter",
        "Memory that the guest freed and the host took back.",
        "bytes",
        _given_back,
    ),
    Family("vmd_vm_cpu_seconds", "counter", "Processor time of the VM's process.", "seconds", _cpu),
    Family("vmd_vm_disk_read_bytes", "counter", "Read by the guest.", "bytes", _disks("to_guest")),
    Family(
        "vmd_vm_disk_written_bytes",
        "counter",
        "Written by the guest.",
        "bytes",
        _disks("from_guest"),
    ),
    Family(
        "vmd_vm_network_receive_bytes",
        "counter",
        "Received by the guest.",
        "bytes",
        _interfaces("received", "to_guest"),
    ),
    Family(
        "vmd_vm_network_transmit_bytes",
        "counter",
        "Sent by the guest.",
        "bytes",
        _interfaces("sent", "from_guest"),
    ),
    Family("vmd_vm_exits", "counter", "Times that the guest was left, as KVM counts.", "", _exits),
)
