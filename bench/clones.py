"""Time a clone by the daemon, beside a start: here, on this KVM, with the self-test guest.

- start: from the request to start a VM to its answer, and to the guest's first output;
- clone: from the request to clone a template to its answer, and to the clone's first byte;
- running: from the request to clone a running VM to its answer; its memory is copied;
- private: the private memory of a clone's process, after the clone has answered;
- many: COUNT clones by one request, until its answer, and until all have answered a byte; and the
  private memory of one of them, with `--ksm` also after the host's kernel has merged equal pages.

Processes wait ready for each clone and start, except those of `many`. `bench.state` measures the
same by fork in a library, without a daemon.
`python -m bench.clones [--rounds N] [--clones N] [--ksm]`
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench.daemon import Merging
from bench.state import private_size
from tests.system.vmd.daemon import READY, Client, Daemon, vm_block

_PAUSE_S = 1.5  # the daemon prepares the next process meanwhile
_MIB = 1 << 20


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clones", type=int, default=100)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 2048], help="MiB")
    parser.add_argument(
        "--ksm", action="store_true", help="also have the host merge equal pages, for a while"
    )
    options = parser.parse_args()
    print("memory   start answer, words   clone answer, byte (least)   running   private   many")
    for memory in options.memory:
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as scratch,
            Daemon(
                Path(scratch),
                "".join(
                    vm_block(name, memory=f"{memory}M")
                    for name in (
                        "template",
                        *(f"plain{number}" for number in range(options.rounds)),
                    )
                ),
                is_user=os.geteuid() != 0,
            ) as vmd,
            vmd.client() as client,
        ):
            print(f"{memory:5}M   {_measure(client, options)}", flush=True)


def _measure(client: Client, options: argparse.Namespace) -> str:
    rounds: int = options.rounds
    clones: int = options.clones
    starts, words, answers, bytes_, stills, privates = [], [], [], [], [], []
    for plain in _plain(rounds):
        time.sleep(_PAUSE_S)
        begun = time.perf_counter()
        _ask(client, "start", name=plain)
        starts.append(time.perf_counter() - begun)
        with client.console(plain) as console:
            console.expect(READY)
        words.append(time.perf_counter() - begun)
        time.sleep(_PAUSE_S)
        begun = time.perf_counter()
        _ask(client, "clone", name=plain, clone="c")
        stills.append(time.perf_counter() - begun)
        _end(client, "c", plain)
    _ask(client, "start", name="template", is_template=True)
    with client.console("template") as console:
        console.expect(READY)
    _ask(client, "pause", name="template")
    for _ in range(rounds):
        time.sleep(_PAUSE_S)
        begun = time.perf_counter()
        (vm,) = _clones(client, 1)
        answers.append(time.perf_counter() - begun)
        _echo(client, str(vm["name"]))
        bytes_.append(time.perf_counter() - begun)
        privates.append(private_size(int(str(vm["pid"]))))
        _end(client, str(vm["name"]))
    time.sleep(_PAUSE_S)
    begun = time.perf_counter()
    vms = _clones(client, clones)
    all_run = time.perf_counter() - begun
    for vm in vms:
        _echo(client, str(vm["name"]))
    all_answer = time.perf_counter() - begun
    private = f"{_private(vms):.1f}M"
    if options.ksm:
        with Merging() as merging:
            merging.wait()
            private += f" ({_private(vms):.1f}M merged)"
    return (
        f"{_ms(starts):.1f}, {_ms(words):.1f} ms   {_ms(answers):.1f}, {_ms(bytes_):.1f} "
        f"({min(bytes_) * 1000:.1f}) ms   {_ms(stills):.1f} ms   "
        f"{statistics.median(privates) / _MIB:.1f}M, {private} of many   "
        f"{clones} in {all_run:.2f}, {all_answer:.2f} s"
    )


def _private(vms: list[dict[str, object]]) -> float:
    """Return the private memory of one of these VMs, in MiB."""
    return statistics.median(private_size(int(str(vm["pid"]))) for vm in vms) / _MIB


def _plain(count: int) -> list[str]:
    """Return the names of `count` VMs: the daemon refuses one that starts too often."""
    return [f"plain{number}" for number in range(count)]


def _ms(times: list[float]) -> float:
    return statistics.median(times) * 1000


def _ask(client: Client, kind: str, **fields: object) -> dict[str, object]:
    answer = client.ask(kind, (), **fields)
    if answer["type"] == "failed":
        raise SystemExit(f"clones: {kind}: {answer}")
    return answer


def _clones(client: Client, count: int) -> list[dict[str, object]]:
    vms = _ask(client, "clone", name="template", clone="c%d", count=count)["vms"]
    assert isinstance(vms, list)
    if any(vm["code"] for vm in vms):
        raise SystemExit(f"clones: {vms}")
    return vms


def _echo(client: Client, name: str) -> None:
    with client.console(name) as console:
        console.type(b"~")
        console.expect(b"~")


def _end(client: Client, *names: str) -> None:
    for name in names:
        _ask(client, "stop", name=name, force=True, wait=True)


if __name__ == "__main__":
    main()
