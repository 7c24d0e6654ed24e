"""The caller's side of autopkgtest's protocol for virtualisation servers."""

from __future__ import annotations

import subprocess
from typing import IO
from urllib.parse import quote, unquote


class Caller:
    """Writes commands to a server, and reads its answers."""

    def __init__(self, commands: IO[str], answers: IO[str]) -> None:
        """Wait for the server's first `ok`."""
        self._commands = commands
        self._answers = answers
        self.read()

    def ask(self, name: str, *words: str) -> list[str]:
        """Give a command; returns the words of its answer behind `ok`, decoded."""
        self.send(name, *words)
        return self.read()

    def send(self, name: str, *words: str) -> None:
        """Give a command without reading its answer."""
        print(name, *map(quote, words), file=self._commands, flush=True)

    def run(self, *words: str, text: str = "") -> tuple[int, str]:
        """Run a command of the testbed as autopkgtest does; returns its status and output."""
        (told,) = self.ask("print-execute-command")  # no word of it has a comma
        command = told.split(",")
        done = subprocess.run(
            [*command, *words], input=text, capture_output=True, text=True, check=False, timeout=600
        )
        return done.returncode, done.stdout

    def read(self) -> list[str]:
        """Return the words of the next answer behind `ok`, decoded."""
        line = self._answers.readline()
        first, *words = line.split() or [""]
        assert first == "ok", line
        return [unquote(word) for word in words]
