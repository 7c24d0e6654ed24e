"""Files that clients have opened for a VM, and passed with the request to start it."""

import os
from contextlib import ExitStack

from vmd.rules.vm import PassedBoot
from vmd.wire.channel import Fds
from vmd.wire.messages import Start


def passed_boot(request: Start, fds: Fds) -> PassedBoot | None:
    """Take what a client has opened; all or nothing.

    Raises:
        MalformedError: it names descriptors that did not come along.
        DescriptorsLostError: this process has none left.
    """
    if request.kernel is None:
        return None
    with ExitStack() as stack:
        taken = []
        for index in (request.kernel, *request.initrd):
            taken.append(fds.take(index))
            stack.callback(os.close, taken[-1])
        stack.pop_all()
    return PassedBoot(taken[0], tuple(taken[1:]), request.append, request.kernel_path or "kernel")
