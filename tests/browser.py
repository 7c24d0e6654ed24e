"""A headless Chromium, driven by the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 60.0
_LOOK_S = 0.05
_READ_MAX = 1 << 20
_FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check"),
    # Tests run as root, in containers without much shared memory, and reach no other host.
    *("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",),
)

Fields = dict[str, Any]  # type: ignore[explicit-any] # what JSON holds


def missing_chromium() -> str | None:
    """Return why there is no browser here."""
    if shutil.which("chromium") is None:
        return "chromium is not installed: scripts/setup.sh does so"
    return None


class Browser:
    """A browser with one page; a context manager that ends it."""

    def __init__(self, directory: Path) -> None:
        """Start it, with its profile in `directory`."""
        self._directory = directory
        self._number = 0
        self._buffer = b""
        self._session = ""
        self.problems: list[str] = []
        """The page's faults: exceptions, errors, and violations of the policy."""

    def __enter__(self) -> Self:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        self._process = subprocess.Popen(
            # It reads from descriptor 3 and writes to 4; dash cannot name descriptors above 9.
            [
                *(
                    "bash",
                    "-c",
                    f'exec chromium "$@" 3<&{to_browser} 4>&{from_browser}',
                    "chromium",
                ),
                *_FLAGS,
                f"--user-data-dir={self._directory}",
                "about:blank",
            ],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._directory)},
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            targets = self._call("Target.getTargets")["targetInfos"]
            page = next(one["targetId"] for one in targets if one["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=page, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = ""
        try:
            self._call("Browser.close")
            self._process.wait(TIMEOUT_S)
        finally:
            self._end()

    def _end(self) -> None:
        os.close(self._write)
        os.close(self._read)
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait(TIMEOUT_S)

    def _call(self, method: str, **parameters: object) -> Fields:
        self._number += 1
        number = self._number
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: Fields = answer["result"]
                return result
            self._note(answer)

    def _receive(self, end: float) -> Fields:
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, "the browser does not answer"
            data = os.read(self._read, _READ_MAX)
            assert data, "the browser has ended"
            self._buffer += data
        packet, _, self._buffer = self._buffer.partition(b"\0")
        message: Fields = json.loads(packet)
        return message

    def _note(self, event: Fields) -> None:
        match event:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": what}}:
                self.problems.append(str(what.get("exception", what)))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as what}}:
                self.problems.append(f"{what['text']} {what.get('url', '')}")

    # A page

    def go(self, url: str) -> None:
        """Open an address."""
        answer = self._call("Page.navigate", url=url)
        assert "errorText" not in answer, answer

    def value(self, expression: str) -> object:
        """Return the value of a JavaScript expression, or of its promise."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        value: object = answer["result"].get("value")
        return value

    def wait_for(self, expression: str) -> object:
        """Wait until an expression is true; returns its value then."""
        end = time.monotonic() + TIMEOUT_S
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: {self.text()} {self.problems}"
            time.sleep(_LOOK_S)
        return value

    def text(self) -> str:
        """Return the text of the page."""
        return str(self.value("document.body.innerText"))

    def click(self, element: str) -> None:
        """Click with the mouse on what an expression is, once it can be seen."""
        inside = f"(() => {{ const one = {element}; if (!one || one.disabled) return null;"
        inside += (
            " one.scrollIntoView({block: 'nearest'}); const box = one.getBoundingClientRect();"
        )
        inside += " return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        place = self.wait_for(inside)
        assert isinstance(place, list)
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        """Type where the focus is."""
        for char in text:
            self._call("Input.dispatchKeyEvent", type="keyDown", text=char, key=char)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=char)

    def press(
        self, key: str, code: int, *, ctrl: bool = False, shift: bool = False, text: str = ""
    ) -> None:
        """Press a key that is no character, by its name and its number on a PC (key codes)."""
        which = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 0}
        which["modifiers"] = 2 * ctrl + 8 * shift
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **which)
        self._call("Input.dispatchKeyEvent", type="keyUp", **which)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Be a browser of a person who prefers `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write what can be seen as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))
