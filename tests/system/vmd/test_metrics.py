"""`vmctl metrics` of a running daemon, read by Prometheus' own parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.system.vmd.daemon import ROOT, Daemon, vm_block
from tests.writing_guest import make_disk
from vmm_kvm.block.image import Format

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
LOOKS = int(os.environ.get("VMM_LOOKS", "8"))
"""Of a second each; 60 for a minute."""
Values = dict[tuple[str, str], dict[str, float]]
"""By the sample's name and its VM's: values by the remaining label, if there is one."""


def scraped(vmd: Daemon) -> Values:
    """Return the parsed output of vmctl."""
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "metrics"],
        cwd=ROOT,
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    families: list[Metric] = list(
        text_string_to_metric_families(done.stdout)  # type: ignore[no-untyped-call]
    )
    found: Values = {}
    for sample in (sample for family in families for sample in family.samples):
        rest = [value for name, value in sample.labels.items() if name not in {"name", "id"}]
        values = found.setdefault((sample.name, sample.labels.get("name", "")), {})
        values[" ".join(rest)] = sample.value
    return found


def test_what_is_scraped_is_what_clients_are_told(start_vmd: Start, tmp_path: Path) -> None:
    """Metrics have states, sizes, disk transfers, growing counts of exits, and starts."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"\xf4" * 510 + b"\x55\xaa" + bytes(1 << 20))  # its boot sector halts
    config = vm_block("one", enabled=True) + vm_block("two")
    config += f'vm "three" {{\ndisk "{disk}" format raw\nmemory 32M\ndisable\n}}\n'
    with start_vmd(config) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        assert client.ask("start", name="three")["type"] == "started"
        # A VM process that does not answer in time is shown without its counters, and a guest that
        # has just begun may not have been left yet.
        deadline = time.monotonic() + 60
        first: Values = {}
        while not (
            ("vmd_vm_cpu_seconds_total", "three") in first
            and sum(first.get(("vmd_vm_exits_total", "one"), {}).values()) > 0
        ):
            assert time.monotonic() < deadline, first
            time.sleep(0.1)
            first = scraped(vmd)
        second = scraped(vmd)
        for name in ("one", "two", "three"):
            vm = client.vm(name)
            state = str(vm["state"])
            assert [key.endswith(f" {state}") for key in first["vmd_vm_info", name]] == [True]
            assert first["vmd_vm_memory_limit_bytes", name] == {"": vm["memory"]}
            assert (("vmd_vm_cpu_seconds_total", name) in first) == (vm["pid"] is not None)
        for metric in ("vmd_vm_exits_total", "vmd_vm_cpu_seconds_total"):
            one = first[metric, "one"]
            assert all(second[metric, "one"][key] >= value for key, value in one.items())
        assert list(first["vmd_vm_disk_read_bytes_total", "three"]) == ["0"]
        assert first["vmd_starts_total", ""] == {"": 2}
        assert first["vmd_start_duration_seconds_count", ""] == {"": 2}
        assert first["vmd_failed_starts_total", ""] == {"": 0}
        disk.unlink()
        client.ask("stop", name="three", force=True, wait=True)
        assert client.ask("start", name="three")["type"] == "failed"
        assert scraped(vmd)["vmd_failed_starts_total", ""] == {"": 1}


class Top:
    """`vmctl top --json`, which adds up what its rates come to, over a time."""

    def __init__(self, vmd: Daemon, vm: str) -> None:
        """Look at a VM over and over."""
        self._vm = vm
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "top", "--json", "-d", "1"],
            cwd=ROOT,
            env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self._next()
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _next(self) -> dict[str, float | None]:
        assert self.process.stdout is not None
        rows = json.loads(self.process.stdout.readline())
        row: dict[str, float | None] = next(row for row in rows if row["name"] == self._vm)
        return row

    def sums(self, looks: int) -> dict[str, float]:
        """Return what the rates of so many looks come to, over the time that they took."""
        sums = dict.fromkeys(("cpu", "disk_read", "disk_written"), 0.0)
        rates = dict(sums)
        at = time.monotonic()
        for _ in range(looks):
            row, now = self._next(), time.monotonic()
            for name in sums:
                # On a busy host, a VM process may not answer in time; its guest goes on as before.
                rate = row[name]
                rates[name] = rates[name] if rate is None else rate
                sums[name] += rates[name] * (now - at)
            at = now
        return sums


def test_sums_are_those_of_top(reachable: Path) -> None:
    """Counters grow by what the rates of `top` add up to, for processors and disks."""
    disk = reachable / "disk.raw"
    make_disk(disk, Format.RAW)
    config = f'vm "busy" {{\ndisk "{disk}" format raw\nmemory 32M\n}}\n'
    names = {
        "cpu": "vmd_vm_cpu_seconds_total",
        "disk_read": "vmd_vm_disk_read_bytes_total",
        "disk_written": "vmd_vm_disk_written_bytes_total",
    }
    with Daemon(reachable, config) as vmd, vmd.client() as client:
        with client.console("busy") as console:
            console.expect(b"=go=")
        with Top(vmd, "busy") as top:
            before = scraped(vmd)
            sums = top.sums(LOOKS)
            after = scraped(vmd)
    for name, metric in names.items():
        grown = after[metric, "busy"].popitem()[1] - before[metric, "busy"].popitem()[1]
        # A scrape and a look of top's are some 100 ms apart, more on a busy host.
        assert grown > 0
        assert 0.6 < sums[name] / grown < 1.4, (name, sums[name], grown)
