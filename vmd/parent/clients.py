"""Clients, as the parent knows them: the control process's numbers, and pending requests."""

from collections.abc import Callable, Sequence
from typing import assert_never

from vmd.parent.client_users import ClientUsers
from vmd.parent.passed import take_passed
from vmd.parent.peer import Peer
from vmd.parent.request_log import RequestLog
from vmd.parent.status import Inquiries, StatusQuestion
from vmd.rules.actions import Action, List
from vmd.rules.registry import Registry
from vmd.rules.vm import Vm
from vmd.wire.channel import (
    ChannelError,
    DescriptorsLostError,
    Fds,
    Loop,
    MalformedError,
    OversizeError,
)
from vmd.wire.internal import (
    PARENT_AND_CONTROL,
    ClientAnswer,
    ClientCame,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    Happened,
    KeepFile,
    ParentToControl,
)
from vmd.wire.messages import (
    AnyAnswer,
    ErrorCode,
    Event,
    Failed,
    InterfaceInfo,
    ParentRequest,
    Start,
    Status,
    Vms,
)
from vmd.wire.transfers import Receive, Send, Snapshot
from vmm_kvm.clock import NANOSECONDS

CONTROL_PATIENCE_NS = 10 * NANOSECONDS
"""How long control may leave the channel to it full; reading is all that it does."""


class Clients:
    """Clients' requests and their answers, by way of the control process."""

    def __init__(
        self,
        loop: Loop,
        registry: Registry,
        users: ClientUsers,
        run: Callable[[Sequence[Action]], None],
        interfaces: Callable[[Vm], tuple[InterfaceInfo, ...]],
    ) -> None:
        """Begin without clients.

        `run` carries out the registry's actions; `interfaces` describes a VM's.
        """
        self._loop = loop
        self._registry = registry
        self._run = run
        self._interfaces = interfaces
        self._users = users
        self._requests = RequestLog(registry.find, registry.note)
        self._questions: set[StatusQuestion] = set()
        self.control: Peer[ParentToControl, ControlToParent] = Peer(
            "control",
            PARENT_AND_CONTROL,
            loop,
            self._take,
            on_end=self._all_left,
            patience_ns=CONTROL_PATIENCE_NS,
        )
        """The process that has their connections."""

    # Answers

    def answer(self, client: int, answer: AnyAnswer, fds: Sequence[int] = ()) -> None:
        """Answer a client; takes ownership of `fds`."""
        if not (isinstance(answer, Vms) and answer.has_more):
            self._users.answered(client)
            self._requests.answered(client, answer)
        try:
            self.control.send_or_raise(ClientAnswer(client=client, answer=answer), fds)
        except OversizeError as err:
            text = f"the answer would be {err}"
            failed = Failed(serial=answer.serial, code=ErrorCode.EIO, message=text)
            self.control.send(ClientAnswer(client=client, answer=failed))

    def tell(self, event: Event) -> None:
        """Tell all that listen to events."""
        self.control.send(Happened(event=event))

    def list_vms(self, question: List, inquiries: Inquiries, running: frozenset[int]) -> None:
        """Ask the processes of running VMs, and answer when they have, or after a short time."""
        client = question.ticket.client

        def answer(asked: StatusQuestion, parts: list[AnyAnswer]) -> None:
            self._questions.discard(asked)
            for part in parts:
                self.answer(client, part)
            self.control.send(Considered(client=client))

        asked = StatusQuestion(self._loop, question, inquiries, answer, self._interfaces)
        self._questions.add(asked)
        asked.ask(running)

    def keep_file(self, uid: int, parcel: int, keeper: int) -> None:
        """Have a file kept that an opener has opened, see `parcels`; takes over both."""
        self.control.send(KeepFile(uid=uid), [parcel, keeper])

    # Requests

    def _take(self, message: ControlToParent, fds: Fds) -> None:
        match message:
            case ClientCame(client=client):
                self._users.came(client, fds)
            case ClientRequest(client=client, request=request):
                self._ask(client, self._users.asks(client), request, fds)
            case ClientGone(client=client):
                self._users.gone(client)
                self._requests.gone(client)
                self._run(self._registry.client_left(client))
                for question in tuple(self._questions):
                    if question.ticket.client == client:
                        self._questions.discard(question)
                        question.cancel()
                        self.control.send(Considered(client=client))
            case _:
                assert_never(message)

    def _ask(self, client: int, uid: int | None, request: ParentRequest, fds: Fds) -> None:
        try:
            if uid is None:
                raise DescriptorsLostError("the daemon had none left to see who connects")
            passed = None
            if isinstance(request, Start | Send | Receive | Snapshot):
                passed = take_passed(request, uid, fds)
        except ChannelError as err:
            is_wrong = isinstance(err, MalformedError)
            code = ErrorCode.EINVAL if is_wrong else ErrorCode.EAGAIN
            self.answer(client, Failed(serial=request.serial, code=code, message=str(err)))
            self.control.send(Considered(client=client))
            return
        self._requests.asked(client, uid, request)
        self._run(self._registry.request(client, uid, request, passed))
        if not isinstance(request, Status):  # whose answer takes as much again
            self.control.send(Considered(client=client))

    def _all_left(self) -> None:
        """Forget the clients: their connections went with the control process."""
        for client in self._users.forget_all():
            self._run(self._registry.client_left(client))
        self._requests.clear()
        # The next control process counts its clients from the first number again.
        for question in self._questions:
            question.cancel()
        self._questions.clear()
