"""Tell when a guest runs its first instruction, by the kernel's tracepoints.

KVM's tracepoint kvm_entry fires each time a vCPU enters the guest, kvm_emulate_insn at each
instruction that KVM emulates instead. A tracing instance of our own keeps the oldest events, with
the time of CLOCK_MONOTONIC; it adds none of our code to the measured path.

Source: Linux Documentation/trace/ftrace.rst, Documentation/trace/events.rst
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Self

_TRACING = Path("/sys/kernel/tracing")
_EVENTS = ("kvm_entry", "kvm_emulate_insn")
_BUFFER_KB = 32768
_LINE = re.compile(rf"-(?P<thread>\d+)\s.* (?P<seconds>\d+\.\d+): ({'|'.join(_EVENTS)}):")


class Instructions:
    """Trace first instructions of guests; a context manager. Needs root."""

    def __init__(self) -> None:
        """Start tracing.

        Raises:
            OSError: the kernel has no such tracepoint, or we may not read it.
        """
        if not (_TRACING / "events").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", str(_TRACING)], check=False)
        self._instance = _TRACING / "instances" / f"bench-{os.getpid()}"
        self._instance.mkdir()
        try:
            for name, value in (
                ("trace_clock", "mono"),
                ("options/overwrite", "0"),
                ("buffer_size_kb", str(_BUFFER_KB)),
                *((f"events/kvm/{event}/enable", "1") for event in _EVENTS),
            ):
                (self._instance / name).write_text(value)
        except OSError:
            self._instance.rmdir()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for event in _EVENTS:
            (self._instance / f"events/kvm/{event}/enable").write_text("0")
        self._instance.rmdir()

    def forget(self) -> None:
        """Drop all events so far."""
        (self._instance / "trace").write_text("")

    def first_of(self, pid: int) -> float:
        """Return when the VM process `pid` first ran an instruction of its guest, as `monotonic()`.

        Raises:
            LookupError: there is no such event.
        """
        threads = {path.name for path in Path(f"/proc/{pid}/task").iterdir()}
        with (self._instance / "trace").open() as trace:
            for line in trace:
                found = _LINE.search(line)
                if found and found["thread"] in threads:
                    return float(found["seconds"])
        raise LookupError(f"no instruction of pid {pid}")
