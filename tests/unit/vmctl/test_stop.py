"""`vmctl stop -a`: its requests, their order, and its report of the answers."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.test_commands import DB, WEB, failed
from vmctl.daemon.stop import last_first
from vmctl.line.cli import main as vmctl
from vmd.wire.messages import (
    AnyAnswer,
    AnyRequest,
    Done,
    ErrorCode,
    Hold,
    State,
    Status,
    Stop,
    Terminated,
    VmInfo,
    Vms,
    Wait,
)


def test_stop_of_all(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """All but stopped VMs are stopped, one after the other; a failure leaves the status 0."""
    other = VmInfo(id=3, name="x", state=State.PAUSED, cpus=1, memory=1 << 29, pid=3)

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        if isinstance(request, Status):
            return [Vms(vms=(WEB, other, DB))]
        if isinstance(request, Stop) and request.id == 1:
            return [failed(ErrorCode.EPERM)]
        return [Done(id=request.id if isinstance(request, Stop) else 0)]

    daemon = serve(answer)
    assert vmctl(["stop", "-a"]) == 0
    assert daemon.requests == [
        Hold(),
        Status(),
        Stop(id=1, in_order=True),
        Stop(id=3, in_order=True),
        Stop(id=2, in_order=True),
    ]
    assert capsys.readouterr().err == (
        "stopping vm web: failed: Operation not permitted\n"
        "stopping vm x: requested to shutdown vm 3\n"
        "stopping vm db: requested to shutdown vm 2\n"
    )


def test_stop_of_all_and_wait(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """All are asked before the first wait; the status tells whether each is stopped.

    VMs that start, wait for their turn, or are stopping already, count as well; one that has ended
    meanwhile is stopped. Starts are held before the VMs are listed.
    """
    states = (State.PAUSED, State.STARTING, State.WAITING, State.STOPPING, State.STOPPED)
    others = [
        VmInfo(id=number, name=f"v{number}", state=state, cpus=1, memory=1 << 29)
        for number, state in enumerate(states, 3)
    ]
    refusals = {5: ErrorCode.NOT_RUNNING, 6: ErrorCode.EALREADY}

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        match request:
            case Status(id=0):
                return [Vms(vms=(WEB, *others))]
            case Status():
                return [Vms(vms=())]
            case Hold():
                return [Done()]
            case Stop(id=vm_id) if vm_id in refusals:
                return [failed(refusals[vm_id])]
            case Stop(id=vm_id):
                return [Done(id=vm_id)]
            case Wait(id=5):
                return [failed(ErrorCode.ENOENT)]
            case Wait(id=vm_id):
                return [Terminated(id=vm_id)]
            case _:
                raise AssertionError(request)

    daemon = serve(answer)
    assert vmctl(["stop", "-aw", "--json"]) == 0
    asked = [each for each in daemon.requests if not isinstance(each, Status) or not each.id]
    numbers = (1, 3, 4, 5, 6)
    assert asked == [
        Hold(),
        Status(),
        *(Stop(id=number, in_order=True) for number in numbers),
        *(Wait(id=number) for number in numbers),
    ]
    output, errors = capsys.readouterr()
    names = ("web", "v3", "v4", "v5", "v6")
    assert errors.splitlines() == [
        f"stopping vm {name}: terminated vm {number}"
        for name, number in zip(names, numbers, strict=True)
    ]
    told = [json.loads(line) for line in output.splitlines()]
    assert [(one["id"], one["exit"], one["reason"]) for one in told] == [
        (number, 0, "terminated") for number in numbers
    ]
    refusals[1] = ErrorCode.EPERM
    assert vmctl(["stop", "-a", "-w"]) == 1
    errors = capsys.readouterr().err
    assert "stopping vm web: failed: Operation not permitted\n" in errors
    assert "stopping vm v3: terminated vm 3\n" in errors


def test_a_vm_that_reboots_before_its_turn_to_stop(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wait that ends with a reboot is repeated."""
    shown = [Vms(vms=(WEB,)), Vms(vms=(WEB,)), Vms(vms=(replace(WEB, state=State.STOPPED),))]

    def answer(request: AnyRequest) -> list[AnyAnswer]:
        match request:
            case Status():
                return [shown.pop(0)]
            case Wait(id=vm_id):
                return [Terminated(id=vm_id)]
            case _:
                return [Done(id=1)]

    daemon = serve(answer)
    assert vmctl(["stop", "-a", "-w"]) == 0
    assert daemon.requests.count(Wait(id=1)) == 2
    assert capsys.readouterr().err == "stopping vm web: terminated vm 1\n"


def test_the_last_is_asked_first() -> None:
    """Each VM is asked after all that start after it; the others keep their order."""

    def a_vm(name: str, *after: str) -> dict[str, object]:
        return {"name": name, "after": after}

    vms = [a_vm("db"), a_vm("x"), a_vm("app", "db", "gone"), a_vm("web", "app", "db")]
    assert [vm["name"] for vm in last_first(vms)] == ["x", "web", "app", "db"]
    assert [vm["name"] for vm in last_first([a_vm("a", "b"), a_vm("b", "a")])] == ["a", "b"]
