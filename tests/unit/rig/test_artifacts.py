"""Kernel packages: the choice among those that a metapackage's paragraphs name."""

from __future__ import annotations

from tests.artifacts import candidates, known_series

SHOWN = """\
Package: linux-image-cloud-amd64
Version: 6.12.95-1~bpo12+1
Depends: linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)

Package: linux-image-cloud-amd64
Version: 6.1.99-1
Depends: linux-image-6.1.0-23-cloud-amd64 (= 6.1.99-1)

Package: linux-image-cloud-amd64
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)
Description: x

"""


def test_the_newest_of_a_series_comes_first() -> None:
    """Versions compare by number, not as text; older ones follow as alternatives."""
    assert candidates(SHOWN, "6.1") == [
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.1.0-23-cloud-amd64",
    ]


def test_a_series_is_not_a_prefix() -> None:
    """6.12 is not a version of 6.1."""
    assert candidates(SHOWN, "6.12") == ["linux-image-6.12.95+deb12-cloud-amd64"]


def test_other_dependencies_come_first() -> None:
    """The kernel is found among the dependencies, as Debian testing lists them."""
    shown = SHOWN.replace("Depends: ", "Depends: linux-base-cloud-amd64 (= 6.12.95-1), ")
    assert candidates(shown, "6.12") == candidates(SHOWN, "6.12")


def test_an_unknown_series_has_no_candidates() -> None:
    """No other kernel is chosen in place of an unknown series."""
    assert candidates(SHOWN, "6.18") == []
    assert candidates("", "6.1") == []


def test_series_are_told_by_age() -> None:
    """Series compare by number, each is listed once, and none if there is no package."""
    assert known_series(SHOWN) == ["6.1", "6.12"]
    assert known_series(SHOWN.replace("6.12.95", "6.1.95")) == ["6.1"]
    assert known_series("") == []
