"""`vmctl metrics`: prometheus_client reads the daemon's values in it."""

from __future__ import annotations

import random

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from vmctl.client import Fields
from vmctl.daemon.metrics import lines

NAMES = ("web", 'quo"te', "back\\slash", "new\nline", "ümlaut", "{a=b}")
TOTALS: Fields = {
    "starts": 7,
    "failed_starts": 2,
    "start_seconds": 0.75,
    "start_bounds": (0.01, 0.1, 1.0),
    "start_counts": (1, 4, 1, 1),
}


def vm(number: int, name: str, *, runs: bool = True) -> Fields:
    """Return a VM as the daemon reports it."""
    rng = random.Random(number)
    moved = [
        {"index": 0, "to_guest": rng.randrange(1 << 40), "from_guest": rng.randrange(1 << 40)},
        {"index": 2, "to_guest": 5, "from_guest": 6},
    ]
    statistics: Fields = {
        "cpu_ns": 1_500_000_000 * number,
        "disks": moved,
        "streams": [{"index": 1, "to_guest": 70, "from_guest": 80}],
        "exits": [{"reason": "io", "count": 11 * number}, {"reason": "other", "count": 3}],
        "guest_memory": {"available": 300 << 20, "total": None},
        "given_back": 5 << 20,
    }
    return {
        "id": number,
        "name": name,
        "pid": 100 + number if runs else None,
        "cpus": 2,
        "memory": 512 << 20,
        "memory_used": 9 << 20 if runs else None,
        "state": "running" if runs else "stopped",
        "uid": 0,
        "gid": None,
        "statistics": statistics if runs else None,
        "interfaces": [{"received": 1000, "sent": 2000}, {"received": 0, "sent": 0}],
    }


def parsed(*vms: Fields) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the reference parser's results, by name and labels."""
    text = "\n".join(lines(vms, TOTALS)) + "\n"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_read_as_it_was_told(name: str) -> None:
    """With any name: labels, sums, and the set of values are right."""
    told = vm(3, name)
    found = parsed(told)

    def value(metric: str, **labels: str) -> float:
        return found[metric, frozenset({"name": name, "id": "3", **labels}.items())]

    assert value("vmd_vm_info", owner="root", state="running") == 1
    assert value("vmd_vm_processors") == 2
    assert value("vmd_vm_memory_limit_bytes") == 512 << 20
    assert value("vmd_vm_memory_bytes") == 9 << 20
    assert value("vmd_vm_cpu_seconds_total") == 4.5
    assert value("vmd_vm_guest_memory_available_bytes") == 300 << 20
    assert value("vmd_vm_memory_given_back_bytes_total") == 5 << 20
    disks = told["statistics"]["disks"]
    for disk in disks:
        at = str(disk["index"])
        assert value("vmd_vm_disk_read_bytes_total", disk=at) == disk["to_guest"]
        assert value("vmd_vm_disk_written_bytes_total", disk=at) == disk["from_guest"]
    assert value("vmd_vm_network_receive_bytes_total", interface="0") == 1000
    assert value("vmd_vm_network_transmit_bytes_total", interface="1") == 80
    assert value("vmd_vm_exits_total", reason="io") == 33
    assert value("vmd_vm_exits_total", reason="other") == 3


def test_a_vm_that_does_not_run_has_no_counters() -> None:
    """A stopped VM has its information and its limits, and no counters that would be zero."""
    names = {name for name, labels in parsed(vm(1, "web", runs=False)) if labels}
    assert names == {
        "vmd_vm_info",
        "vmd_vm_processors",
        "vmd_vm_memory_limit_bytes",
        "vmd_start_duration_seconds_bucket",
    }


def test_starts_are_a_histogram() -> None:
    """Classes are cumulative; count and sum are those of all starts."""
    found = parsed()
    name = "vmd_start_duration_seconds"
    buckets = {dict(labels)["le"]: value for (key, labels), value in found.items() if labels}
    assert buckets == {"0.01": 1, "0.1": 5, "1.0": 6, "+Inf": 7}
    assert (found[f"{name}_count", frozenset()], found[f"{name}_sum", frozenset()]) == (7, 0.75)
    assert found["vmd_starts_total", frozenset()] == 7
    assert found["vmd_failed_starts_total", frozenset()] == 2
