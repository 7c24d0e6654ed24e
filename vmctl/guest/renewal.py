"""Making a clone another machine than its source, by its agent.

A clone draws the random numbers that its source draws, and has its clock, machine-id and host name.
It counts as ready when all of that is renewed, and must not run on if it cannot be.
"""

import time
from uuid import uuid4

from vmctl.guest.access import pauses
from vmctl.guest.agent import Agent, AgentError

_HOST_NAME_MAX = 64


def renew(agent: Agent, name: str, deadline: float) -> None:
    """Give a clone other random numbers, this host's time, another machine-id, and a host name.

    The agent may come late, and a connection may end with the reset of the clone's vsock device:
    both are tried again. `deadline` is of the monotonic clock, `name` the VM's.

    Raises:
        AgentRefusedError: the guest cannot do all of it.
        AgentError: there is no agent by then.
        TimeoutError: it does not answer by then.
    """
    host_name = name.replace("_", "-")[:_HOST_NAME_MAX].strip("-.")
    for pause in pauses():
        try:
            agent.renew(machine_id=uuid4().hex, host_name=host_name, deadline=deadline)
        except AgentError:
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)
        else:
            return
