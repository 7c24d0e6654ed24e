"""The life of each child of the parent: import its modules, confine itself, serve.

Only here do the daemon's processes meet, so that none of them imports another.
"""

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, NoReturn

from vmd.confine.confinements import (
    CONFINEMENTS,
    TPM_CAPABILITIES,
    TPM_DENIALS,
    Kind,
    encrypted_vm_confinement,
    zygote_confinement,
)
from vmd.confine.namespaces import number_children_anew
from vmd.confine.sandbox import (
    Identity,
    client_identity,
    confine,
    confine_executing,
    die_with,
    merge_memory,
    set_title,
)
from vmd.confine.seccomp import compile_filter
from vmd.confine.uids import Uids
from vmd.fresh import Told, fresh_plan, resume_zygote
from vmd.shared import log as logging
from vmd.shared.privsep import Child, Plan, spawn
from vmd.shared.shares import ShareOrder
from vmd.wire.agentx import AGENTX_AND_PARENT
from vmd.wire.channel import Channel
from vmd.wire.files import OPENER_AND_PARENT, OpenerToParent, OpenFiles
from vmd.wire.forking import VMM_AND_ZYGOTE, ZYGOTE_AND_VMM
from vmd.wire.internal import (
    CONTROL_AND_PARENT,
    PRIV_AND_PARENT,
    VMM_AND_PARENT,
)
from vmd.wire.local import LOCAL_AND_PARENT
from vmd.wire.tpm import TPM_AND_PARENT
from vmd.zygote.warm.entry import WARMING_PATIENCE_S, Warmth, warm_up
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.version import version

if TYPE_CHECKING:
    from vmm_kvm.kvm.system import Kvm

log = Log(__name__)

# Modules that VM and device processes need only in some cases: imported before files are out of
# reach.
_LATE_MODULES = (
    *("bz2", "hashlib", "lzma", "zlib", "traceback", "lz4.block", "zstandard"),
    *("encodings.latin_1", "encodings.ascii", "encodings.utf_16_le", "encodings.idna"),
    *("vmm_kvm.block.qcow2.header", "vmm_kvm.block.qcow2.image", "vmm_kvm.block.qcow2.repair"),
    *("vmm_kvm.arch.x86.kernels", "vmm_kvm.boot.nvram", "vmm_kvm.devices.pflash"),
    *("vmm_kvm.machine.dirty", "vmm_kvm.machine.encryption", "vmm_kvm.pci.q35"),
    "vmm_kvm.devices.tpm_crb",
)


@contextmanager
def followed(loop: EventLoop) -> Iterator[EventLoop]:
    """Own a process's loop, which writes messages that the log had no room for."""
    with loop:
        logging.follow(loop)
        try:
            yield loop
        finally:
            logging.follow(None)


def _held(uids: Uids | None) -> tuple[int, ...]:
    """Return what holds the lease of the uids."""
    return () if uids is None else (uids.fd,)


def control_plan(listener: socket.socket, uids: Uids | None) -> Plan:
    """Return how to make a control process for clients of `listener`, which stays the caller's."""

    def body(connection: socket.socket) -> None:
        from vmd.control.process import Control  # noqa: PLC0415 - see the module's docstring

        confine(CONFINEMENTS[Kind.CONTROL], uids and Identity(uids.control, uids.control))
        with followed(EventLoop()) as loop:
            control = Control(loop, Channel(connection, CONTROL_AND_PARENT), listener)
            loop.run()
            control.close()
            # A client's file may delay the exit: accept no connection until then.
            listener.close()

    return Plan(Kind.CONTROL, body, (listener.fileno(), *_held(uids)))


def opener_plan(uid: int) -> Plan:
    """Return how to make a process that opens files with the rights of the user `uid`, once."""

    def body(connection: socket.socket) -> None:
        confine(CONFINEMENTS[Kind.OPENER], client_identity(uid))
        with Channel(connection, OPENER_AND_PARENT) as parent:
            _prepare_opener()(parent)

    _prepare_opener()
    return Plan(Kind.OPENER, body)


@cache
def _prepare_opener() -> Callable[[Channel[OpenerToParent, OpenFiles]], None]:
    """Import and compile the openers' modules once: a start waits for it.

    The parent needs most of them itself, for files of the configuration.
    """
    from importlib import import_module  # noqa: PLC0415 - when the first client has files

    from vmd.opener.process import serve  # noqa: PLC0415 - likewise

    import_module("vmm_kvm.block.qcow2.header")
    compile_filter(CONFINEMENTS[Kind.OPENER].filter)
    return serve


def share_plan(order: ShareOrder, *, is_user: bool) -> Plan:
    """Return how to make a process that serves a shared directory.

    `is_user`: the daemon runs without privileges.
    """
    from vmd.device.share import run  # noqa: PLC0415 - few VMs have one

    if is_user:
        order = order._replace(uid=None)

    def body(connection: socket.socket) -> None:
        connection.close()
        run(order)

    return Plan(Kind.SHARE, body, order.fds)


def vmm_plan(
    kvm_fd: int,
    identity: Identity | None,
    uids: Uids | None,
    warmth: Warmth,
    *,
    fresh_zygotes: int = 0,
) -> Plan:
    """Return how to make a vmm process; `kvm_fd`, an open /dev/kvm, stays the caller's.

    It has so many zygotes that execute the interpreter anew; without any, one that is forked.
    """

    def body(connection: socket.socket) -> None:
        from vmd.vmm.blanks import Blanks  # noqa: PLC0415 - see the module's docstring
        from vmd.vmm.process import Vmm  # noqa: PLC0415 - likewise
        from vmd.wire.blank import Role  # noqa: PLC0415 - likewise

        init = None if uids is None else _number_anew(uids)
        held = () if init is None else (init.connection.fileno(),)
        make = fresh_plan if fresh_zygotes else _zygote_plan
        plan = make(kvm_fd, uids, (*_held(uids), *held), warmth)
        zygotes = [spawn(plan) for _ in range(fresh_zygotes or 1)]
        if init is not None:
            init.connection.close()
        os.close(kvm_fd)
        channels = [Channel(each.connection, VMM_AND_ZYGOTE, asks_pids=True) for each in zygotes]
        confine(CONFINEMENTS[Kind.VMM], identity)
        with followed(EventLoop()) as loop:
            ready = (Role.VM, Role.DISK)
            rehearses = warmth is not Warmth.OFF
            vms = () if uids is None else uids.vms
            blanks = [
                Blanks(
                    loop,
                    channel,
                    zygote.pid,
                    ready,
                    rehearses=rehearses,
                    uids=vms[place :: len(zygotes)],
                )
                for place, (zygote, channel) in enumerate(zip(zygotes, channels, strict=True))
            ]
            Vmm(loop, Channel(connection, VMM_AND_PARENT), blanks)
            loop.run()
            for each in blanks:
                each.close()

    return Plan(Kind.VMM, body, (kvm_fd, *_held(uids)))


def _number_anew(uids: Uids) -> Child | None:
    """Make a pid namespace for later forks; returns its first process, if there is one.

    The namespace lasts until our end of its connection is closed everywhere.
    """
    try:
        number_children_anew()
    except OSError as err:
        log.info("no pid namespace for VM processes: %s", err.strerror)
        return None

    def body(connection: socket.socket) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans there
        confine(CONFINEMENTS[Kind.INIT], Identity(uids.zygote, uids.zygote))
        connection.recvmsg(1)

    return spawn(Plan(Kind.INIT, body, (uids.fd,)))


def _zygote_plan(kvm_fd: int, uids: Uids | None, held: Sequence[int], warmth: Warmth) -> Plan:
    def body(connection: socket.socket) -> None:
        from importlib import import_module  # noqa: PLC0415 - see the module's docstring

        from vmd.device import disk, nic  # noqa: PLC0415 - likewise
        from vmd.vm import process as vm  # noqa: PLC0415 - likewise
        from vmd.vm.rehearsing import prepare_clones  # noqa: PLC0415 - likewise
        from vmd.wire.blank import Role  # noqa: PLC0415 - likewise
        from vmd.zygote import process as zygote  # noqa: PLC0415 - likewise
        from vmm_kvm.kvm.system import Kvm  # noqa: PLC0415 - likewise

        if not merge_memory():
            log.debug("equal pages of VM processes are not to be merged")
        for name in _LATE_MODULES:
            import_module(name)
        # A guest's kernel cache would be a file.
        os.environ.clear()
        for kind in (Kind.VM, Kind.DISK, Kind.NIC):
            compile_filter(CONFINEMENTS[kind].filter)
        sealed = encrypted_vm_confinement()
        compile_filter(sealed.filter)
        kvm = Kvm.from_fd(kvm_fd)

        def begin() -> None:
            confine(zygote_confinement(uids), uids and Identity(uids.zygote, uids.zygote))
            if warmth is not Warmth.OFF:
                prepare_clones(kvm)

        warm_up(
            warmth,
            begin,
            partial(vm.be_vm, kvm),
            partial(_live_untold, kvm, kvm_fd),
            served=connection.fileno(),
            patience_s=WARMING_PATIENCE_S,
            uid=uids and uids.zygote,
        )
        die_with(os.getppid())  # also one that hangs
        logging.set_title(Kind.ZYGOTE)
        set_title(f"vmd: {Kind.ZYGOTE}")
        gc.freeze()
        bodies = {
            Role.VM: zygote.Body(partial(vm.prepare, kvm), partial(vm.run, kvm), (kvm_fd, *held)),
            Role.ENCRYPTED_VM: zygote.Body(
                partial(vm.prepare, kvm, confinement=sealed), partial(vm.run, kvm), (kvm_fd, *held)
            ),
            Role.DISK: zygote.Body(disk.prepare, disk.run, tuple(held)),
            Role.NIC: zygote.Body(nic.prepare, nic.run, tuple(held)),
        }
        zygote.serve(Channel(connection, ZYGOTE_AND_VMM), bodies)

    return Plan(Kind.ZYGOTE, body, (kvm_fd, *held))


def resume(text: str) -> NoReturn:
    """Run a zygote in a newly executed interpreter, see `fresh`."""

    def body(told: Told) -> Callable[[socket.socket], None]:
        warmth = Warmth(told.warmth)
        return _zygote_plan(told.kvm_fd, told.owned(), told.held, warmth).body

    resume_zygote(text, body)


def _live_untold(kvm: "Kvm", kvm_fd: int, end_fd: int, at_end: Callable[[], None]) -> NoReturn:
    """Run the process of a rehearsed VM; `end_fd` is for the function called at its end."""
    from vmd.vm import process as vm  # noqa: PLC0415 - likewise
    from vmd.wire.blank import Preparation, Role  # noqa: PLC0415 - see the module's docstring
    from vmd.wire.forking import Fork  # noqa: PLC0415 - likewise
    from vmd.zygote import process as zygote  # noqa: PLC0415 - likewise

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()

    def run(connection: socket.socket) -> int:
        status = vm.run(kvm, connection)
        at_end()
        return status

    order = Fork(order=0, role=Role.VM, preparation=Preparation.REHEARSED)
    body = zygote.Body(partial(vm.prepare, kvm), run, (kvm_fd, end_fd))
    zygote.begin(order, body, theirs)


def priv_plan(identity: Identity | None) -> Plan:
    """Return how to make a priv process, which changes the host's network."""

    def body(connection: socket.socket) -> None:
        from vmd.priv.nftables import Nftables, NftablesError  # noqa: PLC0415 - see the module's docstring
        from vmd.priv.process import Priv  # noqa: PLC0415 - likewise
        from vmd.priv.rtnetlink import Rtnetlink  # noqa: PLC0415 - likewise
        from vmd.priv.settings import Settings  # noqa: PLC0415 - likewise

        netlink = Rtnetlink()
        try:
            nftables: Nftables | None = Nftables()
        except NftablesError as err:
            log.info("%s", err)
            nftables = None
        confine(CONFINEMENTS[Kind.PRIV], identity)
        with followed(EventLoop()) as loop:
            parent = Channel(connection, PRIV_AND_PARENT)
            priv = Priv(loop, parent, netlink, nftables, Settings())
            parent.watch(loop, priv.take, lambda _: priv.parent_left())
            loop.run()

    return Plan(Kind.PRIV, body)


def local_plan(identity: Identity | None) -> Plan:
    """Return how to make a local process, which answers guests on local interfaces."""

    def body(connection: socket.socket) -> None:
        from vmd.local.process import Local  # noqa: PLC0415 - see the module's docstring

        confine(CONFINEMENTS[Kind.LOCAL], identity)
        with followed(EventLoop()) as loop:
            parent = Channel(connection, LOCAL_AND_PARENT)
            local = Local(loop)
            parent.watch(loop, local.take, lambda _: loop.stop())
            loop.run()
            local.close()

    return Plan(Kind.LOCAL, body)


def agentx_plan(identity: Identity | None) -> Plan:
    """Return how to make an agentx process, which answers the host's SNMP agent."""

    def body(connection: socket.socket) -> None:
        from vmd.agentx.process import Agentx  # noqa: PLC0415 - see the module's docstring

        release = version()
        confine(CONFINEMENTS[Kind.AGENTX], identity)
        with followed(EventLoop()) as loop:
            parent = Channel(connection, AGENTX_AND_PARENT)
            agentx = Agentx(loop, parent, release)
            parent.watch(loop, agentx.take, lambda _: loop.stop())
            loop.run()
            agentx.close()

    return Plan(Kind.AGENTX, body)


def tpm_plan(identity: Identity | None) -> Plan:
    """Return how to make a tpm process, which executes swtpm; before the parent may no more."""

    def body(connection: socket.socket) -> None:
        from vmd.tpm.process import Launcher  # noqa: PLC0415 - see the module's docstring

        confine_executing(identity, frozenset(TPM_CAPABILITIES), TPM_DENIALS)
        with followed(EventLoop()) as loop:
            launcher = Launcher(loop, Channel(connection, TPM_AND_PARENT))
            loop.run()
            launcher.close()

    return Plan(Kind.TPM, body)
