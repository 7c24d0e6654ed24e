"""Public tools that drive OpenBSD's vmctl: their commands, and their reading of the output.

In our own words. Some write operands before options, as OpenBSD's vmctl took them before 6.5, and
some join an option to its value by a blank within one word.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import SELFTEST, TIMEOUT_S, Daemon, vm_block
from tests.vmctl_driver import VMCTL, ConsoleProcess

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


class Tool:
    """The environment of a tool: a vmctl that finds the daemon."""

    def __init__(self, vmd: Daemon) -> None:
        """Speak with `vmd`."""
        self.environment = {**os.environ, "VMD_SOCKET": str(vmd.socket)}

    def vmctl(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command with pipes."""
        return self._run([VMCTL, *words])

    def shell(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script that calls vmctl."""
        return self._run(["sh", "-c", f'vmctl() {{ "{VMCTL}" "$@"; }}\n{script}'])

    def _run(self, words: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )


@pytest.mark.parametrize("is_name_first", [True, False])
def test_packer(is_name_first: bool, tmp_path: Path) -> None:
    """packer: a disk, a start with -B and a piped console, and the id as status's first digits."""
    disk = tmp_path / "packed.qcow2"
    with Daemon(tmp_path, "") as vmd:
        tool = Tool(vmd)
        size = ("-s", "1M")
        tool.vmctl("create", *((disk, *size) if is_name_first else (*size, disk)))
        assert disk.exists()
        options = ["-c", "-L", "-B", "net", "-i", "1", "-m", "64M", "-b", str(SELFTEST)]
        options += ["-d", str(disk)]
        words = ["packed", *options] if is_name_first else [*options, "packed"]
        with ConsoleProcess(
            [str(VMCTL), "start", *words], environment={"VMD_SOCKET": str(vmd.socket)}
        ) as console:
            console.expect("selftest: ready", TIMEOUT_S)
            shown = tool.vmctl("status", "packed").stdout.strip()
            found = re.findall(r"\d+", shown)
            assert found[0] == "1"
            console.send("2468\n")
            console.expect("2468", TIMEOUT_S)
            assert tool.vmctl("stop", "packed").returncode == 0
            assert console.wait(TIMEOUT_S) == 0


def _salts_status(tool: Tool) -> dict[str, dict[str, str]]:
    """Read the table as salt's module does: the header's words name the columns."""
    done = tool.vmctl("status")
    assert done.returncode == 0
    header, *rows = (line.split() for line in done.stdout.splitlines())
    vms = [dict(zip((word.lower() for word in header), row, strict=True)) for row in rows]
    return {vm["name"]: vm for vm in vms}


def test_salt(start_vmd: Start, tmp_path: Path) -> None:
    """salt: one line on standard error names the terminal; another start says EALREADY.

    An option and its value are one word with a blank in it.
    """
    with start_vmd(vm_block("web") + vm_block("db")) as vmd:
        tool = Tool(vmd)
        assert tool.vmctl("create", tmp_path / "a.img", "-s", "1M").returncode == 0
        assert _salts_status(tool)["web"]["pid"] == "-"
        done = tool.vmctl("start", "web")
        assert done.returncode == 0
        found = re.match(r".*successfully, tty (\/dev.*)", done.stderr)
        assert found
        web = _salts_status(tool)["web"]
        assert web["state"] == "running"
        assert found[1].strip() == f"/dev/{web['tty']}"
        again = tool.vmctl("start", "web")
        assert again.returncode == 1
        assert re.match(r".*Operation already in progress$", again.stderr)
        done = tool.vmctl("start", "own", "-i 1", "-b", SELFTEST, "-m 64M")
        assert (done.returncode, _salts_status(tool)["own"]["maxmem"]) == (0, "64.0M")
        assert tool.vmctl("stop", "web").returncode == 0
        assert tool.vmctl("load", tmp_path / "none").returncode == 1
        assert tool.vmctl("reload").returncode == 0
        assert tool.vmctl("reset", "vms").returncode == 0


def _columns(header: str, row: str) -> dict[str, str]:
    """Cut a row where the header's right-aligned words end; the last word is the rest."""
    ends = [found.end() for found in re.finditer(r"\S+", header)][:-1]
    cells = [row[begin:end].strip() for begin, end in zip([0, *ends], ends, strict=False)]
    return dict(zip(header.split(), [*cells, row[ends[-1] :].strip()], strict=True))


def test_ansible(start_vmd: Start) -> None:
    """ansible: a play reads facts by the header, changes a VM, and finds it changed."""
    with start_vmd(vm_block("web") + vm_block("a-name-of-some-length")) as vmd:
        tool = Tool(vmd)

        def facts() -> dict[str, dict[str, str]]:
            header, *rows = tool.vmctl("status").stdout.splitlines()
            vms = [_columns(header, row) for row in rows]
            return {vm["NAME"]: vm for vm in vms}

        assert {name: vm["STATE"] for name, vm in facts().items()} == {
            "web": "stopped",
            "a-name-of-some-length": "stopped",
        }
        assert tool.vmctl("start", "a-name-of-some-length").returncode == 0
        started = facts()["a-name-of-some-length"]
        assert (started["STATE"], started["VCPUS"], started["MAXMEM"]) == ("running", "1", "64.0M")
        assert tool.vmctl("pause", "a-name-of-some-length").returncode == 0
        assert facts()["a-name-of-some-length"]["STATE"] == "paused"
        assert tool.vmctl("unpause", "a-name-of-some-length").returncode == 0
        assert tool.vmctl("stop", "-f", "-w", "a-name-of-some-length").returncode == 0
        assert facts()["a-name-of-some-length"]["STATE"] == "stopped"
        absent = tool.vmctl("status", "absent")
        assert (absent.returncode, len(absent.stdout.splitlines())) == (0, 1)


def test_vman(start_vmd: Start, tmp_path: Path) -> None:
    """vman: a failure ends the script: a file that cannot be loaded, a name in use.

    It waits for the end of an installation by a pattern over the table.
    """
    good, bad = tmp_path / "good.conf", tmp_path / "bad.conf"
    good.write_text(vm_block("autoinstall_one", enabled=True))
    bad.write_text('vm "x" {\n\tmemory lots\n}\n')
    with start_vmd("") as vmd, vmd.client() as client:
        tool = Tool(vmd)
        done = tool.shell(f"vmctl create -s 1M {tmp_path}/disk.img || exit 1\necho made")
        assert done.stdout == "made\n"
        for path, status in ((bad, 1), (tmp_path / "none", 1), (good, 0)):
            done = tool.shell(f"vmctl load {path} || exit 1\necho went on")
            assert (done.returncode, "went on" in done.stdout) == (status, not status), done
        client.wait_for_state("autoinstall_one", "running")
        waiting = 'vmctl status | grep -E -q "^.*running.*autoinstall_one$"'
        assert tool.shell(waiting).returncode == 0
        assert tool.shell("vmctl stop -w -f autoinstall_one").returncode == 0
        assert tool.shell(waiting).returncode == 1
        assert tool.shell("vmctl reload || exit 1").returncode == 0


@pytest.mark.parametrize("is_name_first", [True, False])
def test_syzkaller(is_name_first: bool, tmp_path: Path) -> None:
    """syzkaller: it starts an instance on an overlay, and finds its address by its id."""
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    config = (
        'vm "syzkaller" {\n\tdisable\n\tmemory 64M\n\tdisk "/dev/null" format raw\n'
        "\tlocal interface\n\tallow instance { boot, disk, memory }\n}\n"
    )
    with Daemon(tmp_path, config) as vmd:
        tool = Tool(vmd)
        assert tool.vmctl("create", "-s", "4M", f"qcow2:{base}").returncode == 0
        assert tool.vmctl("stop", "-f", "-w", "ci-0").returncode == 1
        assert tool.vmctl("create", "-b", base, disk).returncode == 0
        options = ["-t", "syzkaller", "-b", str(SELFTEST), "-d", str(disk), "-m", "64M", "-c"]
        words = ["ci-0", *options] if is_name_first else [*options, "ci-0"]
        merged = ["sh", "-c", 'exec "$@" 2>&1', "sh", str(VMCTL), "start", *words]
        with ConsoleProcess(merged, environment={"VMD_SOCKET": str(vmd.socket)}) as console:
            console.expect("selftest: ready", TIMEOUT_S)
            row = tool.vmctl("status", "ci-0").stdout.split("\n")[1]
            found = re.match(r"^\s+([0-9]+)\b.*\brunning", row)
            assert found
            with vmd.client() as client:
                assert client.vm("ci-0")["id"] == int(found[1])
            assert tool.vmctl("stop", "-f", "ci-0").returncode == 0
            assert console.wait(TIMEOUT_S) == 0


def test_shell_wrappers(start_vmd: Start) -> None:
    """awk: column 6 is the terminal, 8 the state and the last one the name."""
    with start_vmd(vm_block("web") + vm_block("db")) as vmd, vmd.client() as client:
        tool = Tool(vmd)
        assert tool.vmctl("start", "web").returncode == 0
        script = "vmctl status | grep web | awk '{ print $6, $8, $NF }'"
        tty = str(client.vm("web")["tty"]).removeprefix("/dev/")
        assert tool.shell(script).stdout == f"{tty} running web\n"
        assert tool.shell(script.replace("web", "db")).stdout == "- stopped db\n"
        names = tool.shell("vmctl status | awk '!/NAME/ { print $NF }'").stdout.split()
        assert sorted(names) == ["db", "web"]
        stopped = 'vmctl status | awk \'$2 == "-" && $5 == "-" { print $NF }\''
        assert tool.shell(stopped).stdout == "db\n"
