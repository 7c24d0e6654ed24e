"""One fuzz target under atheris, in a process of its own: `python -m tests.fuzz.led TARGET ...`.

The arguments after the target are libFuzzer's. The packages under test are imported within
`instrument_imports`, which counts each of their branches.
"""

from __future__ import annotations

import logging
import sys

import atheris

from tests.fuzz import harness


def main() -> None:
    """Run until libFuzzer ends the process."""
    name = sys.argv.pop(1)
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["vmm_kvm", "vmd"]):
        one = harness.target(name)
    atheris.Setup(sys.argv, lambda data: harness.run_input(one, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
