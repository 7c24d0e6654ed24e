"""`vmctl start`: ports that lead to the guest, and its waits."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from vmctl.line.cli import main as vmctl
from vmd.wire.messages import (
    AnyRequest,
    Console,
    ConsoleOpened,
    ForwardRequest,
    InterfaceRequest,
    Start,
    Started,
    Transport,
)

LOCAL = InterfaceRequest(is_local=True)
STARTED = Started(id=7, pid=700, tty="/dev/pts/7")


def test_start_with_forwards(serve: Serve) -> None:
    """Forwards lead to the first local interface, which is made for them if there is none."""
    daemon = serve(lambda _: [STARTED])
    ssh = ForwardRequest(protocol=Transport.TCP, port=8022, to_port=22, address="127.0.0.1")
    dns = ForwardRequest(protocol=Transport.UDP, port=53, to_port=53)
    options = ["--forward", "tcp:127.0.0.1:8022:22", "--forward", "udp:*:53"]
    for more, interfaces in (
        ([], (InterfaceRequest(is_local=True, forwards=(ssh, dns)),)),
        (["-LL"], (InterfaceRequest(is_local=True, forwards=(ssh, dns)), LOCAL)),
        (["-n", "."], (InterfaceRequest(is_local=True, forwards=(ssh, dns)),)),
    ):
        assert vmctl(["start", "-b", "/etc/passwd", *options, *more, "new"]) == 0
        request = daemon.requests[-1]
        assert isinstance(request, Start)
        assert request.interfaces == interfaces


@pytest.mark.parametrize(
    ("shown", "status", "reason"), [(b"a login: ", 0, "found"), (b"a", 124, "timed out")]
)
def test_start_and_wait(
    shown: bytes,
    status: int,
    reason: str,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The start is reported first; then the console is read, and the status tells the outcome."""
    with ExitStack() as stack:

        def answer(request: AnyRequest) -> Answers:
            if isinstance(request, Start):
                return [STARTED]
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(ours).send(shown)
            return [(ConsoleOpened(id=7, tty="/dev/pts/7"), [theirs.detach()])]

        daemon = serve(answer)
        options = ["--json", "--wait", "console=login:", "--timeout", "0.2"]
        assert vmctl(["start", *options, "web"]) == status
    assert daemon.requests == [Start(name="web"), Console(id=7)]
    output, errors = capsys.readouterr()
    told = json.loads(output)
    assert (told["id"], told["exit"], told["reason"]) == (7, status, reason)
    assert errors.startswith("vmctl: started vm 7 successfully, tty /dev/pts/7\n")


def test_start_of_the_selftest(serve: Serve) -> None:
    """The self-test image is opened like any other boot image."""
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", "--selftest", "new"]) == 0
    (request,) = daemon.requests
    assert isinstance(request, Start)
    assert (request.kernel, Path(request.kernel_path).name) == (0, "selftest.bin")
    assert daemon.fd_counts == [1]


@pytest.mark.parametrize(
    ("options", "errors"),
    [
        ("-m 1G", "starting without disks\nno kernel or disk/cdrom specified"),
        ("-m 1GB -b /dev/null", "invalid memory size: 1GB: Invalid argument"),
        (
            "-m 1000 -b /dev/null",
            "memory size must be at least 1MB\n1000 is a number of bytes: did you mean 1000M?",
        ),
        ("-m 129G", "memory size too large (limit is 128G)"),
        ("-m 1G -m 2G", "memory specified multiple times"),
        ("-p 0", "cpu count is too small: 0"),
        ("-p 65", "cpu count is too large: 65"),
        ("-p x", "cpu count is invalid: x"),
        ("-i 0", "count is too small: 0\ninvalid interface count: 0"),
        ("-i 5", "too many network interfaces"),
        ("-LLLLL", "too many network interfaces"),
        ("-B tape", "unknown boot device tape\ndisk, cdrom or net"),
        ("-B net -B net", "boot device specified multiple times"),
        ("-b /dev/null", "kernel must be a regular file"),
        ("-b /none", "invalid boot image path: /none: No such file or directory"),
        ("-b /none -b /none", "boot image specified multiple times"),
        ("-r /none", "invalid iso image path: /none: No such file or directory"),
        ("-d /none", "invalid disk path: /none: No such file or directory"),
        ("-d raw:", "invalid disk: raw:: no path"),
        ("-d pmem:/x", "invalid disk: pmem:/x: only for 'vmctl run' and vm.conf"),
        ("-d /bin/sh -d /bin/ls -d /bin/cp -d /bin/mv -d /bin/cat", "too many disks"),
        ("-d /etc/passwd -d /etc/passwd", "/etc/passwd: the same disk twice"),
        (
            "--firmware efi",
            "unknown firmware efi: No such file or directory (bios, uefi or the path of an image)",
        ),
        ("-t base --initrd /etc/passwd -d /etc/passwd", "--initrd is for a kernel: use -b"),
        ("-t a/b", "invalid VM name"),
        ("-t .x", "invalid VM name"),
        (f"-n {'x' * 64}", "interface name too long"),
        ("--forward tcp:x", "invalid forward: tcp:x: not tcp|udp:[address:]port[:port]"),
        ("--forward tcp:80 --forward tcp:80:81", "forwarded port tcp 80 comes twice"),
        ("--firmware uefi -b /etc/passwd", "-b and --firmware name two boot images: use one"),
        ("--firmware uefi --selftest", "--selftest and --firmware name two boot images: use one"),
        ("--wait console=", "invalid condition: console="),
        ("--timeout 5", "--timeout is for --wait"),
        ("--wait console=x --timeout x", "invalid time-out: x: not a number of seconds"),
        ("-c --wait console=x", "-c and --wait: use one"),
        ("--selftest -b /etc/passwd", "--selftest and -b name two boot images: use one"),
        (
            "--wait walking",
            (
                "invalid condition: walking (running, stopped, ready, file=path, port=number,"
                " unit=name or console=text)"
            ),
        ),
        (
            "--nvram x",
            "--nvram is not for start: vmd keeps the variables of each VM's firmware itself",
        ),
        (f"-t {'x' * 64}", f"instance vm name too long\ninvalid name: {'x' * 64}"),
    ],
)
def test_what_start_refuses_itself(
    options: str, errors: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong options are refused in OpenBSD's words, without a request to the daemon."""
    daemon = serve(lambda _: [STARTED])
    assert vmctl(["start", *options.split(), "web"]) == 1
    assert daemon.requests == []
    expected = "".join(f"vmctl: {line}\n" for line in errors.split("\n"))
    assert capsys.readouterr() == ("", expected)
