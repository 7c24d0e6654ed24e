"""Start a VM, wait until its console shows a text, and stop it: `client.py NAME TEXT [SECONDS]`."""

import sys

from vmctl.client import Client, CommandError


def main(name: str, text: str, seconds: float = 300.0) -> int:
    """Do so; returns the exit status."""
    try:
        with Client() as client:
            started = client.start(name)
            print(f"{name} runs as process {started.pid}, its console is {started.tty}")
            try:
                with client.console(name) as console:
                    print(console.expect(text, timeout=seconds))
            finally:
                client.stop(name, force=True)
    except (CommandError, TimeoutError) as err:
        print(f"{name}: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:4])))
