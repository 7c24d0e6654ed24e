"""What `start`, `stop`, `wait` and `run` say with `--json`: one line of what has become of a VM."""

import time

EXIT_TIMEOUT = 124
"""The status of a command that has waited as long as it was told to, as of timeout(1)."""


class Report:
    """What a command did, from now until `end`."""

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
