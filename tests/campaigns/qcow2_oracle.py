"""Campaign: random qcow2 images, made and changed in turn by QEMU and by this program.

Each case makes an image of random features, perhaps on a base, and has `qemu-img`, `qemu-io` and
our image class change it in turn; a model in memory has the required contents. After each turn of
ours we read the disk back, and so does `qemu-img compare`; `qemu-img check` and our check must find
nothing, not even a leak.

Any deviation is printed, with the seed that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.unit.block.crash import checked  # noqa: E402
from vmm_kvm.block.image import Format, Image  # noqa: E402
from vmm_kvm.images.opening import open_image  # noqa: E402

SIZES = (512, 1 << 20, 3 << 20, (8 << 20) + 512 * 7)
CLUSTER_SIZES = (512, 1024, 4096, 65536, 65536, 1 << 20, 1 << 21)
LENGTHS = (1, 512, 4096, 65536, 300_032, 1 << 20)
BEYOND = 700


class DeviationError(Exception):
    """An image has wrong contents; the message says where."""


def tool(*arguments: str) -> str:
    """Run one of QEMU's tools; return its output.

    Raises:
        DeviationError: it failed.
    """
    done = subprocess.run(arguments, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DeviationError(f"{' '.join(arguments)}: {done.stdout[-400:]}{done.stderr[-400:]}")
    return done.stdout


def read(image: Image, offset: int, size: int) -> bytes:
    """Read from an image."""
    data = bytearray(b"\xa5" * size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


class Case:
    """One image, and the model of its contents; all of it follows from the seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        """Make the image, and its base if it has one, in `directory`, which is empty."""
        self._chance = random.Random(seed)
        self._directory = directory
        self.path = str(directory / "disk.qcow2")
        self.size = self._chance.choice(SIZES)
        self._model = bytearray(self.size)
        self._cluster_size = self._chance.choice(CLUSTER_SIZES)
        self.log: list[str] = []
        options = self._options()
        self.log.append(f"size {self.size}, {options}")
        base = self._base() if self._chance.random() < 0.5 else ()
        tool(
            *("qemu-img", "create", "-q", "-f", "qcow2", *base),
            *("-o", options, self.path, str(self.size)),
        )

    def _options(self) -> str:
        chance = self._chance
        options = [f"cluster_size={self._cluster_size}"]
        self._can_snapshot = True
        if chance.random() < 0.2:
            options.append("compat=0.10")
        else:
            bits = chance.choice((1, 2, 4, 8, 16, 32, 64))
            self._can_snapshot = bits >= 8
            options.append(f"refcount_bits={bits}")
            if self._cluster_size >= 16384 and chance.random() < 0.5:
                options.append("extended_l2=on")
            if chance.random() < 0.3:
                options.append("compression_type=zstd")
            if chance.random() < 0.3:
                options.append("lazy_refcounts=on")
        return ",".join(options)

    def _base(self) -> tuple[str, ...]:
        chance = self._chance
        size = chance.choice((self.size, self.size // 2, self.size * 2)) & ~511
        data = bytearray(chance.randbytes(size))
        for _ in range(4):
            start = chance.randrange(size + 1)
            data[start : start + 200_000] = bytes(len(data[start : start + 200_000]))
        raw = self._directory / "base.raw"
        raw.write_bytes(data)
        shared = min(size, self.size)
        self._model[:shared] = data[:shared]
        disk_format = chance.choice(("raw", "qcow2"))
        if disk_format == "qcow2":
            compressed = ("-c",) if chance.random() < 0.5 else ()
            cluster_size = chance.choice((4096, 65536))
            tool(
                *("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *compressed),
                *("-o", f"cluster_size={cluster_size}", str(raw)),
                str(self._directory / "base.qcow2"),
            )
        name = f"base.{disk_format}"
        self.log.append(f"on {name} of {size}")
        if chance.random() < 0.5:
            name = str(self._directory / name)
        return ("-b", name, "-F", disk_format)

    def run(self, rounds: int = 3) -> None:
        """Change the image in turns.

        Raises:
            DeviationError: an image has wrong contents.
        """
        for number in range(rounds):
            self._turn_of_qemu(number)
            self._turn_of_ours()
            self._compare()

    def _range(self, granule: int) -> tuple[int, int]:
        start = self._chance.randrange(self.size) // granule * granule
        size = min(self._chance.choice(LENGTHS), self.size - start)
        return start, max(size // granule * granule, min(granule, self.size - start))

    def _turn_of_qemu(self, number: int) -> None:
        chance = self._chance
        for _ in range(chance.randrange(4)):
            value = chance.randrange(1, 255)
            what = chance.choice(("-P", "-z", "-z -u", "-c -P"))
            start, size = self._range(self._cluster_size if "-c" in what else 512)
            if "-c" in what:  # one cluster: if more fail, a part might be written
                size = min(self._cluster_size, size)
            command = f"write {what} {value if 'P' in what else ''} {start} {size}"
            arguments = ["qemu-io", "-f", "qcow2", "-c", command, self.path]
            done = subprocess.run(arguments, check=False, capture_output=True, text=True)
            if done.returncode:
                if "-c" in what:
                    continue  # the cluster has data already
                raise DeviationError(f"{command}: {done.stdout}{done.stderr}")
            self.log.append(f"qemu: {command}")
            self._model[start : start + size] = bytes([value if "P" in what else 0]) * size
        if self._can_snapshot and chance.random() < 0.3:
            self.log.append("qemu: snapshot")
            tool("qemu-img", "snapshot", "-c", f"s{number}", self.path)
            if chance.random() < 0.3:
                self.log.append("qemu: snapshot deleted")
                tool("qemu-img", "snapshot", "-d", f"s{number}", self.path)

    def _turn_of_ours(self) -> None:
        image = open_image(self.path, Format.QCOW2, False)
        try:
            for _ in range(self._chance.randrange(12)):
                self._change(image)
            self._expect(read(image, 0, self.size + BEYOND), 0, bytes(self._model) + bytes(BEYOND))
        finally:
            image.close()

    def _change(self, image: Image) -> None:
        chance, model = self._chance, self._model
        start, size = self._range(1 if chance.random() < 0.2 else 512)
        match chance.choice(
            ("write", "write", "write", "zero", "unmap", "discard", "read", "flush")
        ):
            case "write":
                self.log.append(f"ours: write {start} {size}")
                data = memoryview(chance.randbytes(size))
                image.writev(start, [data[: size // 3], data[size // 3 :]])
                model[start : start + size] = data
            case "zero" | "unmap" as what:
                self.log.append(f"ours: {what} {start} {size}")
                image.write_zeroes(start, size, may_unmap=what == "unmap")
                model[start : start + size] = bytes(size)
            case "discard":
                self.log.append(f"ours: discard {start} {size}")
                image.discard(start, size)
                after = read(image, start, size)
                before = model[start : start + size]
                if any(new not in (0, old) for new, old in zip(after, before, strict=True)):
                    raise DeviationError(f"discard of {size} at {start} made data up")
                model[start : start + size] = after
            case "flush":
                self.log.append("ours: flush")
                image.flush()
            case _:
                self._expect(read(image, start, size), start, bytes(model[start : start + size]))

    def _expect(self, found: bytes, start: int, wanted: bytes) -> None:
        if found != wanted:
            first = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            raise DeviationError(f"differs at {start + first}")

    def _compare(self) -> None:
        """Let QEMU compare the disk with the model, and both programs check the image."""
        model = self._directory / "model.raw"
        model.write_bytes(self._model)
        tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(model), self.path)
        tool("qemu-img", "check", "-q", "-f", "qcow2", self.path)
        report = checked(self.path)
        if report.error_count or report.leaked_clusters:
            raise DeviationError(f"our check: {report}")


def run_case(seed: int) -> str | None:
    """Run one case in a directory of its own; return the deviation, if there is one."""
    with tempfile.TemporaryDirectory(prefix="qcow2-oracle-") as directory:
        case = Case(seed, Path(directory))
        try:
            case.run()
        except (DeviationError, OSError) as err:
            return "\n  ".join((f"seed {seed}: {err}", *case.log))
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="how many images")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    deviations = 0
    for seed in range(options.seed, options.seed + options.count):
        deviation = run_case(seed)
        if deviation:
            deviations += 1
            print(deviation)
    took = time.monotonic() - started
    print(f"{options.count} images in {took:.0f} s, {deviations} deviations")
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main())
