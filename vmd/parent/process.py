"""The parent: configuration, the table of VMs, every file that is opened, and the other processes.

It decides nothing about a VM's life itself: requests and reports go to the registry, and `effects`
carries out the returned actions. With root's rights, it reads nothing but the configuration,
messages of the other processes, and the headers of disk images.

Source: sections 5.2, 7 and 8 of OpenBSD's behaviour.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import assert_never

from vmd.config.model import Config, Staggered, VmConfig
from vmd.confine.confinements import Kind
from vmd.parent.agentx import Questions, SnmpAgent
from vmd.parent.client_users import ClientUsers
from vmd.parent.clients import Clients
from vmd.parent.clock import SystemClock
from vmd.parent.configuration import Settings, read_configuration
from vmd.parent.consoles import Consoles
from vmd.parent.effects import Effects, Means
from vmd.parent.interfaces import Interface
from vmd.parent.networks import Networks
from vmd.parent.openers import Openers
from vmd.parent.passed import open_client_files
from vmd.parent.peer import AnyPeer, Peer
from vmd.parent.resources import Host, Resources, open_resources
from vmd.parent.scratches import Scratches
from vmd.parent.shares import Shares
from vmd.parent.snapshots import SnapshotStore
from vmd.parent.status import StatusQuestion
from vmd.parent.terminal_watch import TerminalWatch
from vmd.parent.tpms import Tpms
from vmd.rules.actions import Action, List, Operate
from vmd.rules.registry import Registry
from vmd.rules.vm import Vm
from vmd.rules.vm_state import Ticket
from vmd.shared import log as logging
from vmd.shared.kernels import KernelStore
from vmd.shared.pty import Pty
from vmd.wire.agentx import VmRow
from vmd.wire.blank import SpareCgroup
from vmd.wire.channel import Fds
from vmd.wire.internal import (
    PARENT_AND_VMM,
    EndHung,
    KillVm,
    LookAtTerminal,
    ParentToVmm,
    SetLinks,
    VmmToParent,
)
from vmd.wire.messages import (
    LINE_MAX,
    LINES_MAX,
    AnyAnswer,
    Counts,
    Done,
    ErrorCode,
    Failed,
    Load,
    Log,
    Reload,
    Reset,
    ResetMode,
    Source,
    SourceIs,
    Status,
    Vms,
)
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log as Logger
from vmm_kvm.loop import EventLoop

log = Logger(__name__)

ON_DEMAND = frozenset({Kind.AGENTX})
"""The peers whose processes are started when a configuration needs them."""
_TIDY_NS = 2 * NANOSECONDS
"""After a VM's end: processes that it did not need may still leave its control groups."""
_SINGLE_VMS = "vm.conf.d"
"""The directory of files that have a VM each, beside the configuration."""
STAGGER_DELAY_S = 30
"""Between two batches of starting VMs, unless the configuration says otherwise."""


class Parent:
    """The parent's work, on the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        settings: Settings,
        networks: Networks,
        openers: Openers,
        terminals: TerminalWatch,
        *,
        shares: Shares,
        start: Callable[[Kind], None],
        end_hung: Callable[[int, int], None],
    ) -> None:
        """Begin without VMs and processes; all that is handed in stays the caller's.

        `start` starts a process that not every configuration needs, one of `ON_DEMAND`.
        `end_hung` kills the process of a pidfd, if it is a VM's with that user.
        """
        self._loop = loop
        self._end_hung = end_hung
        self._networks = networks
        self._settings = settings
        self._includes: tuple[str, ...] = ()  # of the configuration
        staggered = Staggered(os.cpu_count() or 1, STAGGER_DELAY_S)
        self._registry = Registry(settings.users, SystemClock(), staggered, settings.host_id)
        self._default_staggered = staggered
        self._kernels = KernelStore()
        cgroups = settings.cgroups
        self._scratches = Scratches()
        tpms = Tpms(loop, settings.state, settings.users, settings.tpm_uids)
        host = Host(
            settings.users, self._kernels, settings.state, self._scratches, shares, tpms, cgroups
        )
        self._snapshots = SnapshotStore(None, settings.users, lambda: self._registry.limits)
        self._consoles = Consoles(terminals, self._look_at_terminal)
        users = ClientUsers(settings.address)
        self._clients = Clients(loop, self._registry, users, self._run, networks.told)
        openers.keep = self._clients.keep_file
        vmm: Peer[ParentToVmm, VmmToParent] = Peer(
            *("vmm", PARENT_AND_VMM, loop, self._from_vmm),
            on_start=lambda: self._offer_cgroup(vmm),
            on_end=self._vmm_ended,
        )
        tidy_timer = None if cgroups is None else loop.timer(cgroups.tidy)

        def close_vm(vm_id: int) -> None:
            shares.release(vm_id)
            if cgroups and tidy_timer:
                cgroups.remove(vm_id)
                tidy_timer.arm(loop.monotonic_ns() + _TIDY_NS)

        def open_vm(vm: Vm, pty: Pty, found: Sequence[Interface]) -> Resources:
            loop.call_soon(lambda: self._offer_cgroup(vmm))  # once vmm was told of this VM
            return open_resources(vm, host, pty, found)

        if cgroups:
            shares.gone = cgroups.tidy
        shares.crashed = lambda vm_id, why: self._share_crashed(vmm, vm_id, why)
        means = Means(
            clients=self._clients,
            vmm=vmm,
            networks=networks,
            consoles=self._consoles,
            kernels=self._kernels,
            snapshots=self._snapshots,
            open_client_files=lambda vm, done: open_client_files(vm, openers, done),
            open_vm=open_vm,
            close_vm=close_vm,
            end_vm=self._scratches.close,
            operate=self._operate,
        )
        self._effects = Effects(loop, self._registry, means)
        networks.watch(self._has_trouble)
        questions = Questions(self._ask_rows, lambda: start(Kind.AGENTX))
        self._snmp_agent = SnmpAgent(loop, questions)
        self.peers: Mapping[Kind, AnyPeer] = {
            Kind.CONTROL: self._clients.control,
            Kind.VMM: vmm,
            Kind.AGENTX: self._snmp_agent.peer,
            Kind.TPM: tpms.peer,
            **networks.peers,
        }
        """Its peers; the code that starts a process tells its peer."""
        for peer in self.peers.values():
            # No request is read while its effects cannot be sent. The other processes are always
            # read: they only answer.
            peer.add_source(self._clients.control)

    def close(self) -> None:
        """Let all processes end, and release the VMs' resources."""
        for peer in self.peers.values():
            peer.close()
        self._consoles.close_all()
        self._scratches.close_all()
        self._kernels.close()

    def _run(self, actions: Sequence[Action]) -> None:
        self._effects.run(actions)

    def _look_at_terminal(self, vm_id: int) -> None:
        self._effects.tell_vm(vm_id, LookAtTerminal())

    @staticmethod
    def _share_crashed(vmm: Peer[ParentToVmm, VmmToParent], vm_id: int, why: str) -> None:
        vmm.send(KillVm(id=vm_id, why=why))

    def _from_vmm(self, message: VmmToParent, fds: Fds) -> None:
        if not isinstance(message, EndHung):
            self._effects.take(message, fds)
        elif fds.left:
            self._end_hung(fds.left[0], message.uid)

    def _vmm_ended(self) -> None:
        if self._settings.cgroups:
            self._settings.cgroups.drop_spare()  # what its processes waited in
        self._effects.vmm_ended()

    def _offer_cgroup(self, vmm: Peer[ParentToVmm, VmmToParent]) -> None:
        """Let processes that wait at vmm join the next VM's control groups."""
        cgroups = self._settings.cgroups
        if cgroups and vmm.is_there and (made := cgroups.spare()):
            vmm.send(SpareCgroup(number=made.number), [made.guest, made.devices])

    # Configuration

    def configure(self) -> tuple[str, ...]:
        """Read the configuration, forget VMs that do not run, and start those to be started.

        Returns its errors, a line each; then nothing has changed.
        """
        settings = self._settings
        config = self._read(settings.path, is_optional=settings.is_optional, keeps_idle=False)
        if not isinstance(config, Config):
            return config
        self._includes = config.includes
        self._effects.run(self._registry.forget_idle())
        settings.set_socket_owner(config.socket_owner)
        self._registry.staggered = config.staggered or self._default_staggered
        self._registry.limits = config.limits
        self._registry.clock = config.clock
        state = settings.state
        self._snapshots.directory = config.snapshots or (state and f"{state}/snapshots")
        self._networks.configure(config)
        self._snmp_agent.configure(config.agentx)
        self._register(config)
        return ()

    def _read(self, path: str, *, is_optional: bool, keeps_idle: bool) -> Config | tuple[str, ...]:
        def judge(vms: Sequence[VmConfig]) -> list[str]:
            return self._registry.judge(vms, self._settings.uid, keeps_idle=keeps_idle)

        return read_configuration(self._settings, path, judge, is_optional=is_optional)

    def _register(self, config: Config) -> None:
        actions = self._registry.load(config.vms, self._settings.uid)
        self._refresh_links()
        self._effects.run(actions)

    def _refresh_links(self) -> None:
        """Plug cables in and out as they are to be now."""
        for vm_id, links in self._networks.refresh().items():
            if vm_id in self._effects.running:
                self._effects.tell_vm(vm_id, SetLinks(are_up=links))

    def _has_trouble(self, vm_id: int, index: int, text: str) -> None:
        self._effects.run(self._registry.trouble(vm_id, f"interface {index}: {text}"))
        self._refresh_links()

    def set_verbosity(self, level: int) -> None:
        """Log more or less, in every process."""
        logging.set_verbosity(level)
        for peer in self.peers.values():
            peer.set_verbosity(level)

    def shut_down(self, on_idle: Callable[[], None]) -> None:
        """End all VMs; `on_idle` is called once, when none is left."""
        self._effects.end_all(on_idle)

    # Requests of the SNMP agent

    def _ask_rows(self, answer: Callable[[list[VmRow]], None]) -> None:
        vms = self._registry.vms
        enabled = {vm.id for vm in vms if vm.config.is_enabled and vm.state.is_from_config}

        def told(_asked: StatusQuestion, parts: list[AnyAnswer]) -> None:
            shown = [vm for part in parts if isinstance(part, Vms) for vm in part.vms]
            answer([VmRow(vm=vm, is_enabled=vm.id in enabled) for vm in shown])

        asked = List(Ticket(client=0, serial=0), Status(serial=0), vms)
        question = StatusQuestion(self._loop, asked, self._effects.inquiries, told, lambda _vm: ())
        question.ask(self._effects.running)

    # Administrators' requests

    def _source(self, serial: int) -> SourceIs:
        """Return where the configuration is, and where files of single VMs go."""
        path = self._settings.host.absolute(self._settings.path)
        directory = f"{path.rpartition('/')[0]}/{_SINGLE_VMS}"
        is_included = any(fnmatch(f"{directory}/x.conf", each) for each in self._includes)
        return SourceIs(serial=serial, path=path, directory=directory if is_included else "")

    def _operate(self, operation: Operate) -> None:
        ticket, request = operation
        errors: tuple[str, ...] = ()
        match request:
            case Load(path=""):
                errors = self.configure()
            case Load(path=path):
                config = self._read(path, is_optional=False, keeps_idle=True)
                if isinstance(config, Config):
                    self._networks.add(config)
                    self._register(config)
                else:
                    errors = config
            case Reload():
                errors = self.configure()
            case Counts():
                self._clients.answer(ticket.client, self._effects.starts.totals(ticket.serial))
                return
            case Source():
                self._clients.answer(ticket.client, self._source(ticket.serial))
                return
            case Reset(mode=ResetMode.SWITCHES):
                self._networks.forget_switches()
            case Reset(mode=mode):
                if mode is ResetMode.ALL:
                    self._networks.forget_switches()
                self._effects.run(self._registry.remove_all(ticket))
                return
            case Log(level=level):
                self.set_verbosity(level)
            case _:
                assert_never(request)
        answer: AnyAnswer = Done(serial=ticket.serial)
        if errors:
            answer = Failed(
                serial=ticket.serial,
                code=ErrorCode.COMMAND_FAILED,
                message="the configuration has errors",
                lines=tuple(line[:LINE_MAX] for line in errors[:LINES_MAX]),
            )
        self._clients.answer(ticket.client, answer)
