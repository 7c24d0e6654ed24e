"""A daemon's uids: the range, and the leased part of it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from vmd.confine.uids import PARTS, UIDS_DEFAULT, UidRange, UidsError, lease, parse_range
from vmd.vmm.uid_pool import UidPool

CLONE_NEWUSER = 0x10000000
RANGE = UidRange(0x10000, 0x1000)


def test_ranges() -> None:
    """A range is a first number and a count; its numbers fit under its mask."""
    assert parse_range("65536:4096") == RANGE
    assert str(RANGE) == "65536 to 69631"
    assert {uid & RANGE.mask for uid in (65536, 69631)} == {65536}
    assert not {uid & RANGE.mask for uid in (0, 65535, 69632, 1 << 31)} & {65536}
    assert parse_range(f"{UIDS_DEFAULT.first}:{UIDS_DEFAULT.size}") == UIDS_DEFAULT


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not first:count"),
        ("65536", "not first:count"),
        ("a:b", "not first:count"),
        ("-4096:4096", "not first:count"),
        ("65536:4095", "the count is no power of two from 1024 on"),
        ("65536:512", "the count is no power of two from 1024 on"),
        ("0:4096", "the first is no multiple of 4096"),
        ("65537:4096", "the first is no multiple of 4096"),
        ("4294966272:1024", "beyond 4294967294"),
    ],
)
def test_what_is_no_range(text: str, why: str) -> None:
    """A range that a filter cannot express, or that holds root, is refused in one line."""
    with pytest.raises(UidsError, match=f"^uids {text}: {why}$"):
        parse_range(text)


@pytest.mark.root
def test_no_two_daemons_have_one_uid(tmp_path: Path) -> None:
    """A part is leased while any process has the descriptor; then it is free again."""
    lock = str(tmp_path / "uids-")
    leases = [lease(RANGE, lock) for _ in range(PARTS)]
    taken = [uid for one in leases for uid in (one.control, one.zygote, *one.vms, *one.tpms)]
    assert sorted(taken) == list(range(RANGE.first, RANGE.first + RANGE.size))
    with pytest.raises(UidsError, match="all are in use by other daemons"):
        lease(RANGE, lock)
    copy = os.dup(leases[3].fd)
    os.close(leases[3].fd)
    with pytest.raises(UidsError):
        lease(RANGE, lock)
    os.close(copy)
    again = lease(RANGE, lock)
    assert again.part == leases[3].part
    for one in (*leases[:3], *leases[4:], again):
        os.close(one.fd)


def test_uids_of_another_user_namespace(tmp_path: Path) -> None:
    """In a container without the numbers, the reason is one line."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if ctypes.CDLL(None).unshare(CLONE_NEWUSER):
                os._exit(2)
            lease(RANGE, str(tmp_path / "uids-"))
        except UidsError as err:
            status = 0 if str(err) == f"uids {RANGE}: {_NOT_HERE}" else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 2:
        pytest.skip("no user namespaces here")
    assert status == 0


_NOT_HERE = "not in this user namespace (choose others by --uids)"


def test_a_uid_comes_again_as_late_as_possible() -> None:
    """A uid is free when its VM is forgotten and the last of its processes is reaped."""
    pool = UidPool((1, 2, 3))
    first = pool.take()
    assert first is not None
    pool.started(100, first)
    pool.started(101, first)
    pool.ended(100)
    pool.release(first)
    others = [pool.take(), pool.take()]
    assert {first, *others} == {1, 2, 3}
    assert pool.take() is None
    assert pool.uid_of(101) == first
    pool.ended(101)
    pool.ended(101)
    assert 101 not in pool
    assert pool.take() == first
    assert pool.take() is None


def test_without_uids_all_is_the_zygotes() -> None:
    """An ordinary user's processes have no uid of their own."""
    pool = UidPool(())
    assert [pool.take(), pool.take()] == [0, 0]
    pool.started(100, 0)
    assert 100 in pool
    pool.ended(100)
    pool.release(0)
    assert pool.take() == 0
