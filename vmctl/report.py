"""Output of `start`, `stop`, `wait` and `run` with `--json`: one line about a VM's result."""

import time

EXIT_TIMEOUT = 124
"""The status of a command that has timed out, as of timeout(1)."""


class Report:
    """The record of a command, from now until `end`."""

    def __init__(self, wanted: bool) -> None:
        """Begin to count the time; nothing is printed unless `wanted`."""
        self._wanted = wanted
        self._began = time.monotonic()

    def end(
        self,
        exit_status: int,
        reason: str,
        vm_id: int | None = None,
        pid: int | None = None,
        tty: str | None = None,
    ) -> int:
        """Print how it ended; returns `exit_status`, which is the command's.

        Args:
            exit_status: 0 on success.
            reason: why it ended so; of several lines the first is taken.
            vm_id: the VM's, if the daemon has said it.
            pid: of the VM's process, likewise.
            tty: path of its console, likewise.
        """
        if self._wanted:
            import json  # noqa: PLC0415 - only for this

            told = {
                "id": vm_id,
                "pid": pid,
                "tty": tty,
                "exit": exit_status,
                "reason": (reason.splitlines() or [""])[0],
                "seconds": round(time.monotonic() - self._began, 3),
            }
            print(json.dumps(told), flush=True)
        return exit_status
