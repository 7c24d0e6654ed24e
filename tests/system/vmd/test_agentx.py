"""VMs in Net-SNMP's agent, compared with the answers to the daemon's clients."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.vmd.daemon import Client, Daemon, vm_block

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]

REGION = ".1.3.6.1.2.1.236"
NAME, STATE, MEMORY = f"{REGION}.1.4.1.2", f"{REGION}.1.4.1.6", f"{REGION}.1.4.1.15"
NUMBER = f"{REGION}.1.2.0"
RUNNING, PAUSED, SHUT_DOWN = 4, 8, 11
PATIENCE_S = 30


def free_port() -> int:
    """Return a UDP port that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def snmpd(directory: Path, port: int) -> Iterator[None]:
    """Run Net-SNMP's agent as a master, with its socket in `directory`."""
    config = directory / "snmpd.conf"
    config.write_text(
        "rocommunity public 127.0.0.1\n"
        "rocommunity inside 127.0.0.1 default\n"
        "master agentx\n"
        f"agentXSocket {directory}/master\n"
        "agentXPerms 0600 0700\n"
    )
    (directory / "master").unlink(missing_ok=True)
    with (directory / "snmpd.log").open("ab") as log:
        process = subprocess.Popen(
            ["snmpd", "-f", "-C", "-c", str(config), "-Le", f"udp:127.0.0.1:{port}"],
            env={"SNMP_PERSISTENT_DIR": f"{directory}/state", "PATH": "/usr/sbin:/usr/bin"},
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def snmp(port: int, tool: str, *words: str) -> dict[str, str]:
    """Query the agent; returns values by their names, as numbers."""
    done = subprocess.run(
        [tool, "-v2c", "-c", "public", "-On", "-Oq", "-OU", "-t", "3", f"127.0.0.1:{port}", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={"MIBS": "", "PATH": "/usr/bin"},
    )
    pairs = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: value.strip().strip('"') for name, _, value in pairs}


def wait_for_value(port: int, name: str, value: str) -> None:
    """Wait until a variable has a value."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := snmp(port, "snmpget", name).get(name)) != value:
        assert time.monotonic() < deadline, f"{name} is {found}"
        time.sleep(0.1)


def expected(client: Client) -> dict[str, str]:
    """Return the daemon's answer to a client, as the table of the MIB."""
    states = {"running": RUNNING, "paused": PAUSED, "stopped": SHUT_DOWN, "waiting": SHUT_DOWN}
    told = {NUMBER: str(len(client.vms()))}
    for vm in client.vms():
        memory = vm["memory"]
        assert isinstance(memory, int)
        told[f"{NAME}.{vm['id']}"] = str(vm["name"])
        told[f"{STATE}.{vm['id']}"] = str(states[str(vm["state"])])
        told[f"{MEMORY}.{vm['id']}"] = str(memory >> 20)
    return told


def test_the_agent_tells_what_status_tells(start_vmd: Start, tmp_path: Path) -> None:
    """A walk, plain or in bulk, equals the clients' view, during starts, pauses and stops."""
    config = f'agentx path "{tmp_path}/master"\n' + "".join(
        vm_block(f"vm{number}", memory=f"{64 * number}M") for number in (1, 2, 3)
    )
    port, rng = free_port(), random.Random(1)
    with snmpd(tmp_path, port), start_vmd(config) as vmd, vmd.client() as client:
        wait_for_value(port, NUMBER, "3")
        for _ in range(12):
            name = f"vm{rng.choice((1, 2, 3))}"
            state = client.vm(name)["state"]
            if state == "stopped":
                assert client.ask("start", name=name)["type"] == "started"
            elif state == "running" and rng.random() < 0.5:
                assert client.ask("pause", name=name)["type"] == "done"
            else:
                client.ask("stop", name=name, force=True, wait=True)
            told = expected(client)
            for tool in ("snmpwalk", "snmpbulkwalk"):
                walked = snmp(port, tool, REGION)
                assert {key: walked.get(key) for key in told} == told, tool
                assert len(walked) == 4 + 14 * 3, tool
        assert walked[f"{REGION}.1.1.1.0"] == "vmm-kvm"


def test_the_agent_and_the_daemon_may_come_and_go(start_vmd: Start, tmp_path: Path) -> None:
    """The daemon connects within five seconds to an agent that starts later, or again."""
    port = free_port()
    config = f'agentx path "{tmp_path}/master"\n{vm_block("one")}'
    with start_vmd(config) as vmd, vmd.client() as client:
        vmd.wait_for_log("master: No such file or directory: trying again every 3 s")
        for _ in range(2):
            with snmpd(tmp_path, port):
                deadline = time.monotonic() + 5 + 1  # and the time of snmpd's start
                while snmp(port, "snmpget", NUMBER).get(NUMBER) != "1":
                    assert time.monotonic() < deadline
        with snmpd(tmp_path, port):
            wait_for_value(port, NUMBER, "1")
            vmd.config.write_text(vm_block("one"))
            assert client.ask("reload")["type"] == "done"
            wait_for_value(port, NUMBER, "No Such Object available on this agent at this OID")
        assert [vm["name"] for vm in client.vms()] == ["one"]


def test_without_agentx_there_is_no_process_for_it(start_vmd: Start) -> None:
    """The process starts only when a configuration asks for it, and once."""
    with start_vmd(vm_block("one")) as vmd, vmd.client() as client:
        with pytest.raises(AssertionError):
            vmd.child("vmd: agentx")
        vmd.config.write_text(f'agentx path "/nowhere/master"\n{vm_block("one")}')
        assert client.ask("reload")["type"] == "done"
        first = vmd.wait_for_child("vmd: agentx")
        assert client.ask("reload")["type"] == "done"
        assert vmd.child("vmd: agentx") == first
