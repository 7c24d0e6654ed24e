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
        "their messages": (
            "tests/unit/test_standard_streams.py::test_other_programs_whose_messages_are_lost"
        ),
        "a pipe that another program made non-blocking": (
            "tests/unit/test_standard_streams.py::test_a_non_blocking_output_is_waited_for"
        ),
    },
    "a file of another format is taken for a raw disk": {
        "packed files, by what begins them": (
            "tests/unit/block/test_vmctl_create.py::test_compressed_images_are_refused"
        ),
        "archives, and pages of a failed download": (
            "tests/unit/block/test_vmctl_create.py::test_archives_are_refused"
        ),
        "the name of a new image": (
            "tests/unit/block/test_vmctl_create.py::test_a_new_image_is_not_named_like_another_format"
        ),
        "a base of an overlay": (
            "tests/unit/block/test_vmctl_create.py::test_a_base_that_is_no_image_is_refused"
        ),
        "devices, pipes and folders": (
            "tests/unit/block/test_vmctl_create.py::test_what_no_disk_can_be_in"
        ),
    },
    "a command that was ended leaves half a file": {
        "a source that cannot be read": (
            "tests/unit/block/test_vmctl_create.py::test_a_copy_that_fails_is_removed"
        ),
        "a file of the same name that came meanwhile": (
            "tests/unit/block/test_vmctl_create.py::test_a_copy_takes_no_place_that_was_taken_meanwhile"
        ),
        "a signal that is ignored": (
            "tests/unit/block/test_vmctl_create.py::test_a_signal_that_is_ignored_ends_no_copy"
        ),
    },
    "an overlay is made that nobody can open, or whose base changes": {
        "a base below the base that is written": (
            "tests/unit/block/test_bases.py::test_a_base_below_the_base"
        ),
        "a base with a colon in its path, which readers take for a protocol": (
            "tests/unit/block/test_bases.py::test_a_base_with_a_colon"
        ),
        "loops, bases that are gone, remote, damaged or no file": (
            "tests/unit/block/test_bases.py::test_no_base_that_nobody_can_open"
        ),
        "copies and changes of the size of an image that is written": (
            "tests/unit/block/test_bases.py::test_a_base_that_qemu_writes"
        ),
        "a path that no header holds": (
            "tests/unit/block/test_bases.py::test_a_base_with_a_path_that_no_header_holds"
        ),
        "a directory that was removed": (
            "tests/unit/block/test_bases.py::test_a_directory_that_was_removed"
        ),
    },
    "a device that is read-only is written; a sparse disk takes minutes to copy": {
        "clusters that are allocated and were never written": (
            "tests/unit/block/test_sparse_copies.py::test_qcow2_images[preallocation=metadata]"
        ),
        "tables of small clusters and of subclusters": (
            "tests/unit/block/test_sparse_copies.py::test_qcow2_images[cluster_size=512]"
        ),
        "many small pieces of data far apart": (
            "tests/unit/block/test_sparse_copies.py::test_scattered_blocks"
        ),
        "holes in the base of an overlay": (
            "tests/unit/block/test_sparse_copies.py::test_an_overlay"
        ),
        "read-only devices of `run` and `image resize`": (
            "tests/unit/block/test_sparse_copies.py::test_read_only_devices"
        ),
    },
    "a name is no UTF-8": {
        "words that vmctl does not know, and a name without a size": (
            "tests/unit/vmctl/test_odd_names.py::test_vmctl"
        ),
        "included files, owners and disks of vm.conf": (
            "tests/unit/vmctl/test_odd_names.py::test_vmd"
        ),
        "results as JSON, and names of bases": (
            "tests/unit/vmctl/test_odd_names.py::test_sound_images"
        ),
        "the daemon's log and answers": (
            "tests/system/vmd/test_names.py::test_files_of_the_configuration"
        ),
    },
    "the disk of the host is full": {
        "a disk in a process of its own": (
            "tests/kvm/test_full_disk.py::test_a_guest_stands_still_until_there_is_room[error=stop,process]"
        ),
        "a disk with several queues": (
            "tests/kvm/test_full_disk.py::test_a_guest_stands_still_until_there_is_room[error=stop,queues=2]"
        ),
        "a guest that is to be told": (
            "tests/kvm/test_full_disk.py::test_a_guest_is_told_that_there_is_no_room"
        ),
        "a stop of a VM that has no room": (
            "tests/system/vmd/test_full_disk.py::test_a_vm_without_room_can_be_stopped"
        ),
        "room that comes during a stop": (
            "tests/system/vmd/test_full_disk.py::test_a_vm_that_is_stopped_goes_on_with_room"
        ),
    },
    "a table on a terminal crops names and numbers": {
        "the table of `show`": (
            "tests/unit/vmctl/test_every_verb.py::test_tables_are_never_cropped[show 1]"
        ),
        "the table of `top`": (
            "tests/unit/vmctl/test_every_verb.py::test_tables_are_never_cropped[top -d 0.1 -n 1]"
        ),
        "characters that take two columns": ("tests/unit/vmctl/test_table.py::test_width"),
    },
    "^C ends in a traceback": {
        "each verb, at ten moments": ("tests/unit/vmctl/test_every_verb.py::test_interrupts"),
        "verbs that wait for the daemon": (
            "tests/unit/vmctl/test_every_verb.py::test_waiting_is_interrupted"
        ),
        "a copy, by each signal": (
            "tests/unit/block/test_vmctl_create.py::test_a_copy_that_is_ended_leaves_nothing"
        ),
    },
    # The daemon reports success and does nothing, or fails without a reason
    "a configuration that is not there, or not found from elsewhere, is an empty one": {
        "a directory, a loop of links, a socket or a huge file, also included": (
            "tests/unit/test_working_directory.py::test_what_is_no_configuration"
        ),
        "a program, a script, a page or UTF-16 instead of a configuration": (
            "tests/unit/test_working_directory.py::test_files_of_another_kind"
        ),
        "an empty name, which was the default file": (
            "tests/unit/test_working_directory.py::test_an_empty_name_is_not_the_default_file"
        ),
        "a working directory that has been removed, in each program": (
            "tests/unit/test_working_directory.py::test_a_directory_that_is_gone"
        ),
        "`load link/../file` and `load file/`, which were other files": (
            "tests/unit/vmctl/test_load.py::test_what_load_asks_for"
        ),
        "a name that is too long for a message": (
            "tests/unit/vmctl/test_load.py::test_what_load_refuses"
        ),
    },
    "an address of an interface that no interface can have": {
        "ports, sizes and addresses of forwards": (
            "tests/unit/test_same_words.py::test_values_of_interfaces"
        ),
        "names of bridges": "tests/unit/test_same_words.py::test_names_of_bridges",
        "names of switches": "tests/unit/test_same_words.py::test_names_of_switches",
        "sizes of memory": "tests/unit/test_same_words.py::test_sizes_of_memory",
        "numbers in other digits than ours": (
            "tests/unit/test_same_words.py::test_numbers_are_decimal"
        ),
        "prefixes and addresses that no host has": "tests/unit/config/test_golden.py::test_golden",
    },
    "VMs that start or wait survive the end of all": {
        "a waiting VM that is stopped by name, by id, by force, twice": (
            "tests/system/vmd/test_stop_states.py::test_of_vms_that_wait"
        ),
        "a VM that several stop at once, of whom each waits": (
            "tests/system/vmd/test_stop_states.py::test_of_a_vm_that_stops"
        ),
        "paused VMs, and guests that ignore the request": (
            "tests/system/vmd/test_stop_states.py::test_of_paused_vms_and_by_force"
        ),
        "a VM that reboots before its turn to stop": (
            "tests/unit/vmctl/test_stop.py::test_a_vm_that_reboots_before_its_turn_to_stop"
        ),
        "a start while starts are held": (
            "tests/unit/vmd/test_order.py::test_nothing_starts_while_starts_are_held"
        ),
    },
    "a network does not work, and nobody says so": {
        "a passt that is another program, fails, is killed, or says nothing": (
            "tests/unit/vmd/test_passt_networks.py::test_a_passt_that_is_none"
        ),
        "a passt that cannot be run, for which the VM did not start": (
            "tests/unit/vmd/test_passt_networks.py::test_a_passt_that_cannot_be_run"
        ),
        "a forward from an address of another host": (
            "tests/unit/vmd/test_passt_networks.py::test_an_address_of_another_host"
        ),
        "a port in use, of each protocol and family": (
            "tests/unit/vmd/test_passt_networks.py::test_a_port_in_use_is_told_of"
        ),
    },
    # Boot images and firmware
    "firmware is refused as no firmware": {
        "SeaBIOS's other builds, and qboot": (
            "tests/unit/boot/test_bios.py::test_builds_of_other_firmware"
        ),
        "images of odd sizes, of zeros, packed, or like another file": (
            "tests/unit/boot/test_bios.py::test_nothing_is_guessed_of_firmware"
        ),
        "a start that -b does not know, which says to use --firmware": (
            "tests/unit/boot/test_bios.py::test_firmware_that_starts_in_another_way"
        ),
        "directories, FIFOs, devices and links for firmware": (
            "tests/unit/boot/test_bios.py::test_what_no_firmware_is_in"
        ),
    },
}
"""Of a kind: what the sibling is, and its test. Kinds that are not here have none listed yet."""
