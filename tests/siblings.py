"""Siblings of the faults in `tests/stumbles.py`: such faults in other places of the tree.

Each is named in words, with the test that holds it off: a place of the tests, and in brackets the
parametrisation where one test has several.
"""

from __future__ import annotations

from typing import Final

SIBLINGS: Final[dict[str, dict[str, str]]] = {
    # Data and terminals
    "descriptors 0 to 2 are closed when a program starts": {
        "the console of a guest whose disk has a process of its own": (
            "tests/kvm/test_closed_streams.py::test_a_closed_descriptor_is_never_a_disk_elsewhere"
        ),
        "an image that `create` makes, byte for byte": (
            "tests/unit/test_standard_streams.py::test_create_with_closed_descriptors"
        ),
        "a daemon's own disks": (
            "tests/system/vmd/test_closed_streams.py::test_a_closed_descriptor_is_never_a_disk"
        ),
    },
    "standard output cannot be written": {
        "a reader of a pipe that has left": (
            "tests/unit/test_standard_streams.py::test_verbs_that_nobody_reads"
        ),
        "standard error that cannot be written": (
            "tests/unit/test_standard_streams.py::test_lost_messages_change_no_status"
        ),
        "programs besides vmctl": "tests/unit/test_standard_streams.py::test_other_programs",
        "a pipe that another program made non-blocking": (
            "tests/unit/test_standard_streams.py::test_a_non_blocking_output_is_waited_for"
        ),
    },
}
"""Of a kind: what the sibling is, and its test. Kinds that are not here have none listed yet."""
