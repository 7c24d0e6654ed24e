"""The page of `vmctl web`, as a person uses it: in headless Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import Browser, missing_chromium
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Client, Daemon, vm_block
from tests.system.vmd.users import USER
from tests.web import WebServer

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(missing_chromium() is not None, reason=str(missing_chromium())),
]

WIDTHS = (1280, 400)
FITS = """(() => {
    const [inner, outer] = ['#terminal .xterm-screen', '#terminal'].map(
        (one) => document.querySelector(one).getBoundingClientRect());
    return inner.bottom <= outer.bottom && inner.right <= outer.right && inner.height > 200;
})()"""
"""The terminal's rows and columns are all to be seen."""


@contextmanager
def browser(reachable: Path) -> Iterator[Browser]:
    """Start a browser, with its files out of the way of the daemon's."""
    profile = reachable / "profile"
    profile.mkdir()
    with Browser(profile) as page:
        page.resize(1280, 900)
        yield page


def row(name: str) -> str:
    """Return the expression for a VM's row."""
    return f"document.querySelector('#vms tr[data-name=\"{name}\"]')"


def button(name: str, text: str) -> str:
    """Return the expression for a button of a VM."""
    return (
        f"[...{row(name)}.querySelectorAll('button')].find((one) => one.textContent === '{text}')"
    )


def wait_for_state(page: Browser, name: str, state: str) -> None:
    """Wait until the page shows a VM in a state."""
    page.wait_for(f"{row(name)}?.querySelector('.state').textContent === '{state}'")


def shows(text: str) -> str:
    """Return the expression that is true once the terminal shows a text."""
    return f"document.querySelector('#terminal .xterm-rows').innerText.includes('{text}')"


def pictures(page: Browser, name: str, *, has_terminal: bool = True) -> None:
    """Check that nothing is wider than the page; keep pictures if VMM_PICTURES names a folder."""
    folder = os.environ.get("VMM_PICTURES")
    for width in WIDTHS:
        page.resize(width, 900)
        page.wait_for(f"innerWidth === {width}")
        assert page.value("document.documentElement.scrollWidth <= innerWidth"), (name, width)
        if has_terminal:
            page.wait_for(FITS)
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            if folder:
                page.screenshot(Path(folder) / f"{name}-{width}-{scheme}.png")
    page.resize(WIDTHS[0], 900)


def save_snapshots(page: Browser, client: Client) -> None:
    """Save a snapshot in a VM's details; a name that is none, or has one, is refused in words."""
    for name, said in (
        ("", "invalid snapshot name"),
        ("one", "saved as one"),
        ("one", "there is a snapshot one"),
        ("two", "saved as two"),
    ):
        page.click("document.getElementById('snapshot-name')")
        page.value("document.getElementById('snapshot-name').value = ''")
        page.type(name)
        page.click("document.getElementById('snapshot')")
        page.wait_for(f"document.getElementById('details-said').textContent.includes('{said}')")
    pictures(page, "snapshot")
    kept = client.ask("snapshots")["snapshots"]
    assert isinstance(kept, list)
    assert sorted(one["name"] for one in kept) == ["one", "two"]
    assert client.vm("web")["state"] == "running"


def test_a_person(reachable: Path) -> None:
    """The link logs in; a VM is started, watched, typed to, paused, continued, and stopped."""
    config = vm_block("web") + vm_block("a-name-that-is-as-long-as-names-of-build-runners-are")
    with (
        Daemon(reachable, config) as vmd,
        vmd.client() as client,
        WebServer(vmd.socket) as server,
        browser(reachable) as page,
    ):
        page.go(f"http://127.0.0.1:{server.port}/")
        page.wait_for("document.body?.innerText.includes('open the link')")
        page.go(server.link)
        wait_for_state(page, "web", "stopped")
        assert page.text().startswith("vmd\n\n0 of 2 VMs running")

        page.click(button("web", "Start"))
        wait_for_state(page, "web", "running")
        page.wait_for("document.getElementById('events').innerText.includes('started')")
        page.click(button("web", "Console"))
        page.wait_for(shows("selftest: ready"))
        page.type("12")
        page.wait_for(shows("12"))
        # Its rates are there by the second look.
        page.wait_for(f"{row('web')}.querySelector('.cpu').textContent.endsWith('%')")
        pictures(page, "console")

        page.click(button("web", "Pause"))
        wait_for_state(page, "web", "paused")
        assert client.vm("web")["state"] == "paused"
        page.click(button("web", "Unpause"))
        wait_for_state(page, "web", "running")

        page.click(button("web", "More"))
        page.wait_for("document.getElementById('details').innerText.includes('selftest.bin')")
        pictures(page, "details")
        page.click("document.getElementById('clone')")
        page.wait_for("document.getElementById('details-said').textContent === 'web-1'")
        save_snapshots(page, client)
        page.click("document.getElementById('details-close')")
        wait_for_state(page, "web-1", "running")

        page.click(button("web", "Stop"))
        wait_for_state(page, "web", "stopped")
        page.wait_for("document.getElementById('console-title').innerText.includes('has ended')")
        assert client.vm("web")["state"] == "stopped"
        # Chromium counts the 401 of the page without a cookie, and of the icon that it looks for,
        # and the two snapshots that are refused.
        problems = [one for one in page.problems if "401 (Unauthorized)" not in one]
        assert len([one for one in problems if one.endswith("/api/snapshot")]) == len(problems) == 2


def test_the_keyboard_alone(reachable: Path) -> None:
    """Keys start a VM, type to it, leave its console, and pause it; the focus is never lost."""
    config = vm_block("web")
    with (
        Daemon(reachable, config) as vmd,
        vmd.client() as client,
        WebServer(vmd.socket) as server,
        browser(reachable) as page,
    ):
        page.go(server.link)
        wait_for_state(page, "web", "stopped")
        focused = "document.activeElement.getAttribute('aria-label')"
        page.press("Tab", 9)
        assert page.value(focused) == "Start web"
        page.press("Enter", 13, text="\r")
        wait_for_state(page, "web", "running")
        page.wait_for(f"{focused} === 'More web'")
        page.press("Tab", 9, shift=True)
        page.press("Enter", 13, text="\r")
        page.wait_for(shows("selftest: ready"))
        page.type("12")
        page.wait_for(shows("12"))
        page.press("Tab", 9)  # is the guest's
        assert page.value("document.activeElement.closest('#terminal') !== null")
        page.press("F6", 117, ctrl=True)
        assert page.value("document.activeElement.id") == "console-close"
        page.press("Enter", 13, text="\r")
        page.wait_for("document.getElementById('console').hidden")
        page.click(button("web", "More"))
        page.click("document.getElementById('snapshot-name')")
        page.type("one")
        page.press("Enter", 13, text="\r")
        page.wait_for("document.getElementById('details-said').textContent === 'saved as one'")
        page.press("Escape", 27)
        page.wait_for("!document.getElementById('details').open")
        assert client.vm("web")["state"] == "running"
        assert page.problems == [] or all("401" in one for one in page.problems)


def test_without_vms_and_without_a_daemon(reachable: Path) -> None:
    """The page says that there are no VMs, and why nothing answers; then it goes on by itself."""
    with browser(reachable) as page, Daemon(reachable, "") as vmd:
        with WebServer(vmd.socket) as server:
            page.go(server.link)
            page.wait_for("document.body?.innerText.includes('There are no VMs.')")
            assert "None since this page was opened." in page.text()
            pictures(page, "empty", has_terminal=False)
            vmd.stop()
            page.wait_for("document.getElementById('summary').textContent === 'disconnected'")
            pictures(page, "disconnected", has_terminal=False)
            with Daemon(reachable, vm_block("a" * 63)):
                page.wait_for("document.body?.innerText.includes('0 of 1 VMs running')")
                assert page.value("document.getElementById('problem').hidden")
                pictures(page, "long", has_terminal=False)
        page.wait_for("document.body?.innerText.includes('vmctl web does not answer')")
        pictures(page, "gone", has_terminal=False)


@pytest.mark.root
@needs_separation
def test_another_users_vm(reachable: Path) -> None:
    """Another user's VM is shown; operations on it are refused, and the page says so."""
    config = f"socket owner {USER}\n" + vm_block("web", enabled=True)
    with (
        Daemon(reachable, config, is_user=False) as vmd,
        vmd.client() as root,
        WebServer(vmd.socket, uid=USER) as server,
        browser(reachable) as page,
    ):
        pid = root.wait_for_state("web", "running")["pid"]
        page.go(server.link)
        wait_for_state(page, "web", "running")
        page.click(button("web", "Stop"))
        page.wait_for(
            "document.getElementById('problem').textContent === 'web: the VM is not yours'"
        )
        page.click(button("web", "Console"))
        page.wait_for("document.getElementById('console-title').innerText.endsWith('not yours')")
        pictures(page, "refused")
        assert root.vm("web")["pid"] == pid
