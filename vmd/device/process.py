"""Common code of the processes of disks and interfaces: from blank to serving one device.

One ends when the VM's process does, which learns by a pipe when it can serve, or why it cannot.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmd.confine.confinements import CONFINEMENTS, Kind
from vmd.confine.sandbox import confine, set_title
from vmd.shared import log as logging
from vmd.shared.privsep import join_ahead, join_cgroup
from vmd.wire.blank import JoinCgroup
from vmd.wire.channel import Channel, ChannelError, Received
from vmd.wire.device import DEVICE_AND_VMM, DeviceBegin, VmmToDevice
from vmd.wire.internal import SetVerbosity
from vmd.wire.parcels import opened
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.vhost_user.process import serve
from vmm_kvm.virtio.vhost_user.readiness import tell_failure, tell_ready

log = Log(__name__)

# The last writes of a VM that is ended must reach the disk.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

Make = Callable[[DeviceBegin, list[int], Callable[[], bool]], Backend]
"""Makes the device from what vmm said and the descriptors that came along, which it owns, all but
the socket and the pipe. The function says whether the VM is still there, for one that waits.

Raises:
    VmmError, OSError: it cannot; the VM's process is told the text.
"""


def prepare(title: str, kind: Kind) -> None:
    """Confine this process, which is to serve a device."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    set_title(title)
    confine(CONFINEMENTS[kind], None)


def run(title: str, connection: socket.socket, make: Make) -> int:
    """Receive a device from `connection`, and serve it; returns the exit status."""
    with Channel(connection, DEVICE_AND_VMM) as vmm:
        joined = 0
        try:
            begin, fds, _size = vmm.wait()
            while isinstance(begin, JoinCgroup):
                joined = join_ahead(begin, fds)
                begin, fds, _size = vmm.wait()
        except ChannelError as err:  # this process is not needed any more
            log.debug("vmm: %s", err)
            return 0
        with fds:
            if isinstance(begin, SetVerbosity):
                log.error("told how much to log, and not what to serve")
                return 1
            logging.set_verbosity(begin.verbosity)
            logging.set_title(f"vm/{begin.vm}: {begin.device}")
            set_title(f"{title}/{begin.vm}")
            *own, sock, status_fd = fds.take_all()
        vm = socket.socket(fileno=sock)
        with vm:
            try:
                if begin.cgroup:
                    fd = own.pop(0)
                    if begin.cgroup == joined:
                        os.close(fd)
                    else:
                        join_cgroup(fd)
                own = opened(own)
                backend = make(begin, own, lambda: _is_there(vm))
            except (VmmError, OSError) as err:
                tell_failure(status_fd, str(err))
                return 0  # the VM's process tells
            if not tell_ready(status_fd):
                backend.close()
                return 0
            vm = socket.socket(fileno=vm.detach())
        serve(vm, backend, on_loop=lambda loop: listen_to_vmm(vmm, loop))
    return 0


def _is_there(vm: socket.socket) -> bool:
    """Tell whether the VM's process, which is silent until the device is ready, still runs."""
    try:
        return vm.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def listen_to_vmm(vmm: Channel[None, VmmToDevice], loop: EventLoop) -> Iterator[None]:
    """Take the verbosity from vmm; we outlive it, for the VM's last writes."""
    logging.follow(loop)

    def take(received: Received[VmmToDevice]) -> None:
        received.fds.close()
        if isinstance(received.message, SetVerbosity):
            logging.set_verbosity(received.message.level)

    vmm.watch(loop, take, lambda _: None)
    try:
        yield
    finally:
        vmm.close()
        logging.follow(None)
