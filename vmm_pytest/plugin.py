"""The plugin: options, the marker, the fixtures, and the report of a failing test.

Every run of pytest in an environment with vmm-kvm imports this module, also a run without VMs: it
imports nothing but pytest at its top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from pluggy import Result

    from vmm_pytest.machine import Machine
    from vmm_pytest.run import Run
    from vmm_pytest.templates import FindAgent, MakeMachine, MakeTemplate

    Reporting = Generator[None, Result[pytest.TestReport], None]

_MARKER = (
    "vm(image, kernel, initrd, append, memory, cpus, network, timeout): "
    "the machine that the fixtures vm and vm_factory make"
)
_MACHINES: pytest.StashKey[list[Machine]] = pytest.StashKey()
_HAS_FAILED: pytest.StashKey[bool] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("vm", "virtual machines")
    add = group.addoption
    add("--vm-image", metavar="[FORMAT:]PATH[,ro]", help="disk of machines whose marker names none")
    add("--vm-kernel", metavar="PATH", help="their kernel")
    add("--vm-initrd", metavar="PATH", help="their initial RAM disk")
    add("--vm-append", metavar="TEXT", help="their kernel command line")
    add(
        "--vm-keep",
        choices=("no", "failed"),
        default="no",
        help="let the machines of failed tests run on",
    )
    add(
        "--vm-console",
        choices=("failed", "all", "no"),
        default="failed",
        help="which tests' reports have the consoles' output (-rP shows those of passed tests)",
    )
    add("--vm-socket", metavar="PATH", help="socket of a running vmd, instead of one of our own")
    add(
        "--vm-require",
        action="store_true",
        help="fail a test that cannot have a machine here, instead of skipping it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Reporting:
    """Add the consoles' output to the report of a test that has had machines."""
    outcome = yield
    machines = item.stash.get(_MACHINES, None)
    if machines is None:
        return
    report = outcome.get_result()
    if report.failed:
        item.stash[_HAS_FAILED] = True
    shown = item.config.getoption("vm_console")
    is_last = report.when == "call" or report.failed
    if is_last and (shown == "all" or (shown == "failed" and report.failed)):
        report.sections += [
            (f"Console of {machine.name}", machine.console.text()) for machine in machines
        ]
    if report.failed and item.config.getoption("vm_keep") == "failed":
        report.sections += [(f"{one.name} is kept", one.how_to_reach()) for one in machines]


def _settings(request: pytest.FixtureRequest, given: Mapping[str, object]) -> dict[str, object]:
    """Return what is given, else by the nearest marker that says it, else by an option."""
    settings = dict(given)
    for marker in request.node.iter_markers("vm"):
        if marker.args:
            pytest.fail("the marker vm takes keywords alone", pytrace=False)
        settings = {**marker.kwargs, **settings}
    # The options' initial RAM disk and command line are for the options' kernel.
    names = ("image",) if "kernel" in settings else ("image", "kernel", "initrd", "append")
    for name in names:
        value = request.config.getoption(f"vm_{name}")
        if value is not None:
            settings.setdefault(name, value)
    return settings


@pytest.fixture(scope="session")
def vm_agent(vm_run: Run) -> FindAgent:
    """Return how to reach the agent of a machine, by its name.

    Override it for guests whose agent does not listen on a vsock port.
    """
    return vm_run.agent_of


@pytest.fixture(scope="session")
def vm_run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Yield this process's share of a daemon: its own, or that of `--vm-socket`."""
    from vmm_pytest.run import NoMachinesError, Run  # noqa: PLC0415 - only runs with machines

    config = request.config
    given: Mapping[str, str] = getattr(config, "workerinput", {})
    try:
        run = Run(given.get("testrunuid", ""), config.getoption("vm_socket"))
    except NoMachinesError as err:
        (pytest.fail if config.getoption("vm_require") else pytest.skip)(str(err))
    with run:
        yield run


@pytest.fixture(scope="session")
def vm_template(vm_run: Run, vm_agent: FindAgent, pytestconfig: pytest.Config) -> MakeTemplate:
    """Return a function that makes the template of some settings, or finds it."""
    from vmm_pytest.templates import Templates  # noqa: PLC0415 - as above

    return Templates(vm_run, vm_agent, pytestconfig.rootpath).get


@pytest.fixture
def vm_factory(
    request: pytest.FixtureRequest, vm_template: MakeTemplate, vm_run: Run
) -> Iterator[MakeMachine]:
    """Yield a function that makes machines for a test; keywords go before those of the marker."""
    machines = request.node.stash.setdefault(_MACHINES, [])

    def make(**given: object) -> Machine:
        __tracebackhide__ = True
        return vm_template(**_settings(request, given)).clone(machines.append)

    try:
        yield make
    finally:
        is_kept = request.config.getoption("vm_keep") == "failed" and request.node.stash.get(
            _HAS_FAILED, False
        )
        for machine in machines:
            if is_kept:
                vm_run.keep(machine.name)
            machine.close(is_kept=is_kept)


@pytest.fixture
def vm(vm_factory: MakeMachine) -> Machine:
    """Return a fresh machine, which ends with the test."""
    __tracebackhide__ = True
    return vm_factory()
