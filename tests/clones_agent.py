"""The agent of a clone, as a process of this host: it changes neither its clock nor its names.

Each request that a clone is sent is a line of JSON in the file TOLD; the agent refuses the one that
the file REFUSES names. All else is the agent's own. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmm_agent import agent
from vmm_kvm.libc import LIBC

_PR_SET_PDEATHSIG = 1

Request = Mapping[str, object]


def _telling(what: str) -> Callable[[Request], None]:
    def tell(request: Request) -> None:
        refuses = Path(os.environ["REFUSES"])
        if refuses.exists() and refuses.read_text() == what:
            raise agent.RefusedError("EPERM", f"{what}: Operation not permitted")
        with Path(os.environ["TOLD"]).open("a") as file:
            file.write(f"{json.dumps({**request, 'do': what})}\n")

    return tell


vars(agent).update(
    _add_entropy=_telling("entropy"),
    _set_clock=_telling("clock"),
    _set_identity=_telling("identity"),
)

if __name__ == "__main__":
    LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sys.exit(agent.main())
