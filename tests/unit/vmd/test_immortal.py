"""Objects whose references are not counted: they are used without being written to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vmd.zygote.warm.entry import IMMORTAL_VERSIONS

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] not in IMMORTAL_VERSIONS, reason="it is not done on this version"
)


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_references_are_not_counted() -> None:
    """References to what was there are not counted, those to new objects are."""
    _run("""
import sys, weakref
from vmd.zygote.warm.immortal import immortalise
class Kept: pass
one, number, text = Kept(), 1 << 70, "".join(("a", "text"))
kept = [one, number, text, ("a", 1 << 71), Kept]
immortalise()
counts = [sys.getrefcount(each) for each in (*kept, kept[3][1])]
more = kept * 1000 + [kept[3][1]] * 1000
assert [sys.getrefcount(each) for each in (*kept, kept[3][1])] == counts
del more
assert [sys.getrefcount(each) for each in (*kept, kept[3][1])] == counts
new = Kept()
before = sys.getrefcount(new)
also = new
assert sys.getrefcount(new) == before + 1
gone = weakref.ref(new)
del new, also
assert gone() is None
""")


def test_a_forked_process_shares_what_it_uses() -> None:
    """A child that uses objects on a thousand pages copies few of them."""
    _run("""
import os, resource
from vmd.zygote.warm.immortal import immortalise
def faults_of_use():
    pid = os.fork()
    if pid == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in kept: pass
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        os._exit(faults > 100)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
kept = [bytes(100) + bytes([each & 255]) for each in range(40_000)]
assert faults_of_use() == 1
immortalise()
assert faults_of_use() == 0
""")


def test_the_interpreter_ends() -> None:
    """It can be done twice, and the interpreter still ends in order."""
    _run("""
from vmd.zygote.warm.immortal import immortalise
immortalise()
made = [object() for _ in range(1000)]
immortalise()
""")
