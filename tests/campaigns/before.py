"""Run the tests of `tests/stumbles.py` on trees from before each kind of fault was mended.

A test that passes there holds nothing off. Each test is tried on:

1. its present form, with the programs of the commit that is given: the tree before all mends;
2. if it uses what this commit lacks, its first form, with the programs of the commit before the one
   that brought it.

What a test's file imports for other tests may be missing (`LENIENT`).

Trees are made in a temporary folder, with `git`. Tests of `tests/guest`, which a rig would have to
run, are passed over. The report is a line for each test: `fails` where it failed by its own word,
`lacks` where even its first form needs what was not there, `passes`. Exit status 1 if one passes
that is not among `HELD`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.stumbles import HELD, STUMBLES  # noqa: E402  # the folder is known only now

BEFORE = "bb7da63"
"""The last commit before the first of the mends."""
PROGRAMS = ("vmm_kvm", "vmd", "vmctl")
AGENT = "vmm_agent"
SCRIPTS = {
    "vmctl": "vmctl.__main__",
    "vmd": "vmd.__main__",
    "vmm-blk": "vmm_kvm.commands.vmm_blk",
    "vmm-net": "vmm_kvm.commands.vmm_net",
}
TIMEOUT_S = 300
LENIENT = '''"""What programs lack can be imported from them, and fails when it is used."""
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

class LacksError(Exception):
    """A test needs what is not there."""

class Missing(type):
    """What is missing: whatever it is asked for, it has not."""
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(name, (), {})
    def __call__(cls, *given, **named):
        if given and isinstance(given[0], str) and len(given) == 3:
            return super().__call__(*given)
        raise LacksError(cls.__name__)
    def __iter__(cls):
        return iter(())
    def __or__(cls, other):
        return cls
    __ror__ = __or__

def missing(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name, (), {"__init__": lambda self, *given, **named: lacks(name)})

def part_of(module, name):
    if "__path__" in vars(module) and not name.startswith("__"):
        whole = f"{module.__name__}.{name}"
        if not isinstance(find_spec(whole).loader, Nothing):
            return import_module(whole)
    return missing(name)

def lacks(name):
    raise LacksError(name)

class Nothing(Loader):
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.__getattr__ = missing
        module.__path__ = []

class Finder(MetaPathFinder):
    """Comes last: for modules that nobody else finds."""
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"vmm_kvm", "vmd", "vmctl", "vmm_agent"}:
            return ModuleSpec(name, Nothing(), is_package=True)
        return None

class Wrapping(MetaPathFinder):
    """Comes first: lets the modules that are there have more names than they have."""
    busy = False
    def find_spec(self, name, path, target=None):
        if self.busy or name.partition(".")[0] not in {"vmm_kvm", "vmd", "vmctl"}:
            return None
        Wrapping.busy = True
        try:
            spec = find_spec(name)
        finally:
            Wrapping.busy = False
        if spec and spec.loader and not isinstance(spec.loader, Nothing):
            execute = spec.loader.exec_module
            def exec_module(module):
                execute(module)
                if "__getattr__" not in vars(module):
                    module.__getattr__ = lambda name: part_of(module, name)
            spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Wrapping())
sys.meta_path.append(Finder())
'''
"""A plugin of pytest, for the process of the tests alone."""
_LACKS = re.compile(
    r"LacksError|ModuleNotFoundError|ImportError|AttributeError|NameError|fixture '\w+' not found"
)


def git(*words: str) -> str:
    """Return what a git command of this tree prints."""
    return subprocess.run(
        ["git", "-C", ROOT, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


class Trees:
    """A tree whose programs and whose tests are of two commits."""

    def __init__(self, folder: Path) -> None:
        """Make the tree below `folder`, and an environment of Python with this one's packages."""
        self.top = folder / "tree"
        git("worktree", "prune")
        git("worktree", "add", "--detach", "--force", str(self.top), "HEAD")
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", self.top / ".venv"], check=True
        )
        (packages,) = (self.top / ".venv" / "lib").glob("python*/site-packages")
        (theirs,) = (ROOT / ".venv" / "lib").glob("python*/site-packages")
        (packages / "before.pth").write_text(f"{self.top}\n{theirs}\n")
        for name, module in SCRIPTS.items():
            script = self.top / ".venv" / "bin" / name
            script.write_text(
                f"#!{self.top}/.venv/bin/python\nimport sys\nfrom {module} import main\n"
                "sys.exit(main())\n"
            )
            script.chmod(0o755)

    def set(self, programs: str, tests: str) -> None:
        """Have the programs of one commit, and all else of another."""
        for name in (*PROGRAMS, AGENT, "tests"):
            shutil.rmtree(self.top / name, ignore_errors=True)
        self._git("checkout", "--force", "--detach", tests)
        for name in PROGRAMS:
            shutil.rmtree(self.top / name)
        self._git("checkout", programs, "--", *PROGRAMS)
        (self.top / "lenient.py").write_text(LENIENT)

    def _git(self, *words: str) -> None:
        subprocess.run(["git", "-C", self.top, *words], check=True, capture_output=True)

    def run(self, place: str) -> str:
        """Run a test; return how it went, and why."""
        environment = {
            **os.environ,
            "VMD_REQUIRE": "kvm,root",
            "PYTHONPATH": str(self.top),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # ours is not in every tree
        }
        try:
            done = subprocess.run(
                [
                    *(self.top / ".venv/bin/python", "-m", "pytest", "-q", "-x"),
                    *("-p", "pytest_timeout", "-p", "lenient", "-p", "no:cacheprovider"),
                    *("--timeout", "60", "--tb=line", place),
                ],
                cwd=self.top,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return "fails: not within its time"
        if done.returncode == 0:
            return "passes"
        lines = [line.strip() for line in done.stdout.splitlines()]
        reasons = [line for line in lines if re.search(r"^E  |Error|^ERROR|^FAILED", line)]
        reason = reasons[0] if reasons else " ".join(lines[-2:])
        if done.returncode != 1 or _LACKS.search(done.stdout):
            return f"lacks: {reason}"
        return f"fails: {reason}"


def first_commit(place: str) -> str:
    """Return the commit that brought a test, by its name."""
    name = place.partition("::")[2]
    found = git("log", "--reverse", "--format=%h", f"-Sdef {name}(", "--", "tests")
    return found.splitlines()[0]


def tell(place: str, trees: Trees, before: str) -> str:
    """Try a test on the trees before; return how it went."""
    trees.set(before, git("rev-parse", "HEAD"))
    told = trees.run(place)
    if not told.startswith("lacks"):
        return f"{told} [{before}]"
    commit = first_commit(place)
    path, _, name = place.partition("::")
    trees.set(f"{commit}^", commit)
    if not (trees.top / path).exists():
        (path,) = (
            found.relative_to(trees.top).as_posix()
            for found in (trees.top / "tests").rglob("test_*.py")
            if f"def {name}(" in found.read_text(encoding="utf-8")
        )
    later = trees.run(f"{path}::{name}")
    return f"{told} [{before}]" if later == "passes" else f"{later} [{commit}^]"


def main() -> int:
    """Try every test; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default=BEFORE, help="the tree before all mends")
    parser.add_argument("tests", nargs="*", help="these alone, by a part of their place")
    given = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        trees = Trees(Path(folder))
        try:
            for kind, places in STUMBLES.items():
                print(f"{kind}", flush=True)
                for place in places:
                    if given.tests and not any(part in place for part in given.tests):
                        continue
                    if place.startswith("tests/guest/"):
                        print(f"    {place}: for the rig", flush=True)
                        continue
                    told = tell(place, trees, given.before)
                    print(f"    {place}: {told[:200]}", flush=True)
                    if told.startswith("passes") and place not in HELD:
                        wrong.append(place)
        finally:
            git("worktree", "remove", "--force", str(trees.top))
    for place in wrong:
        print(f"passes on the tree before: {place}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
