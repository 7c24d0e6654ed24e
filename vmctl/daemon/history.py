"""`vmctl log`: the daemon's verbosity, and its log lines of a VM.

Source: section 3.11 of OpenBSD's behaviour, for the former.
"""

import time
from collections.abc import Sequence

from vmctl.client import Client, CommandError, Fields, RefusedError, Target, parse_target, text_of
from vmctl.messages import fail
from vmctl.moment import moment
from vmm_kvm.text import printable

_LEVELS = (("brief", 0), ("verbose", 2))
_DELAY_S = 0.5


def log(words: Sequence[str], *, follow: bool = False, as_json: bool = False) -> int:
    """Set the daemon's verbosity, or print the log lines of a VM, and new ones."""
    word = words[0]
    shown = follow or as_json
    level = next((value for name, value in _LEVELS if word and name.startswith(word.lower())), None)
    try:
        with Client() as client:
            if level is not None and not shown:
                client.ask("log", "done", {"level": level})
                return 0
            _show(client, parse_target(word), follow=follow, as_json=as_json)
    except RefusedError as err:
        why = "" if err.code == "command-failed" else f": {text_of(err.code)}"
        return fail(f"command failed{why}\n{err.detail}")
    except CommandError as err:
        return fail(err)
    return 0


def _show(client: Client, target: Target, *, follow: bool, as_json: bool) -> None:
    """Print the existing lines; with `follow`, new ones as well, until interrupted."""
    position = 0
    while True:
        answer = client.ask("history", "lines", {**target.fields(), "position": position})
        position = answer["position"]
        for line in answer["lines"]:
            print(_line(line, as_json=as_json), flush=True)
        if not follow:
            return
        time.sleep(_DELAY_S)


def _line(line: Fields, *, as_json: bool) -> str:
    if as_json:
        import json  # noqa: PLC0415 - loaded by the client anyway

        return json.dumps({"at": line["at"], "text": line["text"]})
    return printable(f"{moment(line['at'])} {line['text']}")
