"""Faults that users of machine monitors report, and the tests for each kind of fault.

Each kind is in the users' words. Its tests try several inputs, reported ones and others.

`tests/campaigns/before.py` runs them on the tree before the mends, bb7da63. Of the 93 tests of
2026-11-30, 58 failed there by their assertions, 23 needed a function, option or field that the
tree did not have, and those of `HELD` passed; 4 are for the rig, where this was not tried.
"""

from __future__ import annotations

from typing import Final

STUMBLES: Final[dict[str, tuple[str, ...]]] = {
    # Data and terminals
    "descriptors 0 to 2 are closed when a program starts": (
        "tests/unit/test_standard_streams.py::test_closed_descriptors_are_opened_first",
        "tests/unit/test_standard_streams.py::test_create_with_closed_descriptors",
        "tests/kvm/test_closed_streams.py::test_a_closed_descriptor_is_never_a_disk",
        "tests/system/vmd/test_closed_streams.py::test_a_closed_descriptor_is_never_a_disk",
    ),
    "standard output cannot be written": (
        "tests/unit/test_standard_streams.py::test_verbs_whose_output_is_lost",
        "tests/unit/test_standard_streams.py::test_other_programs",
        "tests/unit/test_standard_streams.py::test_other_programs_whose_messages_are_lost",
        "tests/kvm/test_closed_streams.py::test_a_full_output_changes_no_status",
    ),
    "a file of another format is taken for a raw disk": (
        "tests/unit/block/test_vmctl_create.py::test_foreign_formats_are_refused",
        "tests/unit/block/test_vmctl_create.py::test_compressed_images_are_refused",
        "tests/unit/block/test_vmctl_create.py::test_archives_are_refused",
        "tests/unit/block/test_vmctl_create.py::test_a_new_image_is_not_named_like_another_format",
        "tests/unit/block/test_vmctl_create.py::test_a_new_image_is_not_named_like_a_packed_file",
        "tests/unit/block/test_vmctl_create.py::test_what_no_disk_can_be_in",
        "tests/unit/block/test_vmctl_create.py::test_a_base_that_is_no_image_is_refused",
    ),
    "a command that was ended leaves half a file": (
        "tests/unit/block/test_vmctl_create.py::test_a_copy_that_is_ended_leaves_nothing",
        "tests/unit/block/test_new_file.py::test_a_relative_name",
    ),
    "an overlay is made that nobody can open, or whose base changes": (
        "tests/unit/block/test_vmctl_create.py::test_no_overlay_on_an_image_that_is_written",
        "tests/unit/block/test_vmctl_create.py::test_no_overlay_that_nobody_can_open",
        "tests/unit/block/test_bases.py::test_a_base_that_qemu_writes",
        "tests/unit/block/test_bases.py::test_a_base_that_another_user_writes",
        "tests/unit/block/test_bases.py::test_a_base_below_the_base",
        "tests/unit/block/test_bases.py::test_no_base_that_nobody_can_open",
        "tests/unit/block/test_bases.py::test_a_base_with_a_colon",
        "tests/unit/block/test_bases.py::test_a_base_with_a_path_that_no_header_holds",
        "tests/unit/block/test_bases.py::test_a_directory_that_was_removed",
    ),
    "a device that is read-only is written; a sparse disk takes minutes to copy": (
        "tests/unit/block/test_vmctl_create.py::test_a_read_only_device_is_not_written",
        "tests/unit/block/test_vmctl_create.py::test_a_huge_disk_with_little_in_it",
        "tests/unit/block/test_sparse_copies.py::test_qcow2_images",
        "tests/unit/block/test_sparse_copies.py::test_scattered_blocks",
        "tests/unit/block/test_sparse_copies.py::test_an_overlay",
        "tests/unit/block/test_sparse_copies.py::test_data_and_holes_in_turn",
        "tests/unit/block/test_sparse_copies.py::test_read_only_devices",
    ),
    "the disk of the host is full": (
        "tests/kvm/test_full_disk.py::test_a_guest_stands_still_until_there_is_room",
        "tests/system/vmd/test_full_disk.py::test_a_vm_is_paused_until_there_is_room",
        "tests/system/vmd/test_full_disk.py::test_a_guest_is_told_where_that_was_asked_for",
    ),
    "a table on a terminal crops names and numbers": (
        "tests/unit/vmctl/test_every_verb.py::test_tables_are_never_cropped",
        "tests/unit/vmctl/test_table.py::test_width",
    ),
    "a terminal stays as a guest has set it; a console repeats its history": (
        "tests/unit/vmctl/test_attach.py::test_a_terminal_is_given_back",
        "tests/unit/vmctl/test_terminal.py::test_what_was_changed_is_undone",
        "tests/system/vmd/test_console.py::test_a_console_that_stays_attached_shows_nothing_twice",
    ),
    "a name is no UTF-8": (
        "tests/unit/vmctl/test_every_verb.py::test_names_that_are_no_text",
        "tests/system/vmd/test_names.py::test_files_of_the_configuration",
        "tests/system/vmd/test_names.py::test_files_of_vmctl",
        "tests/unit/vmctl/test_odd_names.py::test_vmctl",
        "tests/unit/vmctl/test_odd_names.py::test_sound_images",
        "tests/unit/vmctl/test_odd_names.py::test_vmd",
    ),
    "^C ends in a traceback": (
        "tests/unit/vmctl/test_every_verb.py::test_interrupts",
        "tests/unit/vmctl/test_every_verb.py::test_waiting_is_interrupted",
    ),
    "an answer that nobody expects ends in a traceback": (
        "tests/unit/vmctl/test_unexpected.py::test_unexpected_answers",
        "tests/unit/vmctl/test_unexpected.py::test_no_answer_is_a_traceback",
    ),
    # The daemon reports success and does nothing, or fails without a reason
    "a configuration that is not there, or not found from elsewhere, is an empty one": (
        "tests/system/vmd/test_life.py::test_relative_paths_in_the_background",
        "tests/system/vmd/test_life.py::test_a_named_configuration_has_to_be_there",
        "tests/unit/test_working_directory.py::test_a_directory_that_is_gone",
        "tests/unit/test_working_directory.py::test_an_empty_name_is_not_the_default_file",
        "tests/unit/vmctl/test_load.py::test_what_load_asks_for",
    ),
    "a mistake in a file that is read again forgets VMs": (
        "tests/system/vmd/test_life.py::test_a_configuration_with_a_mistake_changes_nothing",
    ),
    "the client is not told where and what is wrong": (
        "tests/unit/config/test_advice.py::test_what_two_vms_cannot_have",
        "tests/unit/config/test_advice.py::test_the_same_name_twice",
        "tests/unit/config/test_advice.py::test_switches",
        "tests/unit/config/test_advice.py::test_more_memory_than_there_is",
        "tests/unit/config/test_advice.py::test_a_disk_that_one_reads_and_another_writes",
        "tests/unit/config/test_advice.py::test_a_disk_twice_in_one_vm",
        "tests/unit/config/test_advice.py::test_two_switches_of_one_name",
        "tests/unit/vmd/test_unusable.py::test_images",
        "tests/system/vmd/test_life.py::test_broken_vms_can_be_skipped",
    ),
    "an address of an interface that no interface can have": (
        "tests/unit/config/test_golden.py::test_golden",
        "tests/unit/net/test_nic_options.py::test_what_is_refused",
        "tests/unit/test_same_words.py::test_addresses_of_interfaces",
        "tests/unit/test_same_words.py::test_values_of_interfaces",
    ),
    "VMs that start or wait survive the end of all": (
        "tests/unit/vmctl/test_stop.py::test_stop_of_all_and_wait",
        "tests/unit/vmd/test_order.py::test_nothing_starts_while_starts_are_held",
        "tests/system/vmd/test_stop.py::test_a_stop_of_all_leaves_none_to_start",
        "tests/system/vmd/test_stop.py::test_vms_start_and_stop_in_order",
    ),
    "a VM ends and nobody knows why": (
        "tests/system/vmd/test_stop.py::test_the_last_of_quick_reboots_is_told",
        "tests/system/vmd/test_life.py::test_a_vm_that_dies_right_after_its_start_leaves_a_trace",
        "tests/unit/vmctl/test_history.py::test_show_tells_all_of_a_vm",
        "tests/unit/vmctl/test_history.py::test_what_was_logged_of_a_vm",
    ),
    "a network does not work, and nobody says so": (
        "tests/system/vmd/test_passt.py::test_without_passt",
        "tests/system/vmd/test_passt.py::test_a_host_that_is_offline",
        "tests/system/vmd/test_passt.py::test_a_port_that_somebody_has",
        "tests/unit/vmd/test_priv.py::test_rules_that_are_refused",
    ),
    "an option is ignored": (
        "tests/unit/vmctl/test_start.py::test_what_start_refuses_itself",
        "tests/unit/vmctl/test_verbs.py::test_run_and_start_have_the_same_options",
        "tests/unit/vmctl/test_commands.py::test_a_dot_is_a_local_interface",
    ),
    "an error has a number and no subject": (
        "tests/unit/vmctl/test_commands.py::test_names_are_checked_first",
        "tests/unit/vmctl/test_commands.py::test_wait_in_its_own_words",
        "tests/unit/vmctl/test_commands.py::test_long_names_are_told_in_words",
        "tests/unit/vmd/test_request_log.py::test_a_failure_is_told_in_words",
        "tests/unit/snapshot/test_handover.py::test_a_receiver_that_has_gone",
        "tests/unit/block/test_locks.py::test_who_has_the_lock_is_named",
    ),
    "a message misleads a newcomer": (
        "tests/unit/vmctl/test_commands.py::test_no_daemon",
        "tests/unit/vmctl/test_commands.py::test_who_may_connect",
        "tests/unit/vmctl/test_start_files.py::test_start_refuses_the_same_disk_twice",
    ),
    # Boot images and firmware
    "firmware is refused as no firmware": (
        "tests/unit/boot/test_bios.py::test_builds_of_ovmf",
        "tests/unit/boot/test_bios.py::test_what_is_said_to_be_firmware_is_not_guessed",
        "tests/unit/boot/test_bios.py::test_nothing_is_guessed_of_firmware",
    ),
    "a kernel that needs a BIOS, or a program, hangs": (
        "tests/unit/boot/test_bios.py::test_a_disk_is_no_kernel",
        "tests/unit/boot/test_multiboot.py::test_xen_needs_a_bios",
        "tests/unit/boot/test_linux.py::test_a_program_with_a_kernels_header_needs_a_bios",
        "tests/unit/boot/test_bios.py::test_programs_are_named_as_what_they_are",
    ),
    "a test kernel finds a part of a PC missing": (
        "tests/unit/devices/test_single_ports.py::test_port92_resets",
        "tests/unit/boot/test_multiboot.py::test_low_kernels",
        "tests/kvm/test_run.py::test_resets_in_a_row_are_told_once",
    ),
    # Missing features
    "a disk that is thrown away": (
        "tests/kvm/test_disks.py::test_a_snapshot_is_thrown_away",
        "tests/system/vmd/test_throw_away_disks.py::test_of_the_configuration",
        "tests/system/vmd/test_throw_away_disks.py::test_of_a_client",
    ),
    "a forwarded port lets in the whole network, or not even this host": (
        "tests/system/vmd/test_networks.py::test_forwards_from_the_loopback",
        "tests/unit/config/test_forwards.py::test_forwards",
    ),
    "a time-out looks like a failure": (
        "tests/unit/vmctl/test_start.py::test_start_and_wait",
        "tests/unit/vmctl/test_commands.py::test_wait_ends",
    ),
    "a VM that is paused for two reasons goes on after one": (
        "tests/kvm/test_holding.py::test_a_vm_stands_still_for_two_reasons",
        "tests/system/vmd/test_full_disk.py::test_a_pause_and_a_full_disk_at_once",
    ),
    "a VM process is stopped by a signal": (
        "tests/system/vmd/test_stop.py::test_a_pause_of_a_process_that_is_stopped",
        "tests/system/vmd/test_stop.py::test_a_process_that_does_not_end_is_ended",
        "tests/guest/test_requests.py::test_processors_an_alarm_and_a_stopped_process",
    ),
    "tools that others have written drive vmctl": (
        "tests/system/vmd/test_tools.py::test_packer",
        "tests/system/vmd/test_tools.py::test_salt",
        "tests/system/vmd/test_tools.py::test_ansible",
        "tests/system/vmd/test_tools.py::test_shell_wrappers",
        "tests/system/vmd/test_tools.py::test_vman",
        "tests/system/vmd/test_tools.py::test_syzkaller",
    ),
    "the address of a VM's interface changes with each start": (
        "tests/unit/vmd/test_addressing.py::test_addresses_that_nobody_chose",
        "tests/unit/vmd/test_addressing.py::test_an_address_that_is_taken_is_passed_over",
    ),
    "an overlay has to be as large as its base, and disks keep their size": (
        "tests/unit/block/test_vmctl_create.py::test_an_overlay_may_be_larger_than_its_base",
        "tests/unit/block/test_vmctl_create.py::test_resize",
        "tests/unit/block/test_vmctl_create.py::test_resize_of_an_overlay",
        "tests/unit/block/test_vmctl_create.py::test_resize_is_refused",
    ),
    "a VM made by start vanishes with the daemon": (
        "tests/system/vmd/test_save.py::test_a_vm_that_is_saved",
        "tests/system/vmd/test_save.py::test_a_configuration_that_does_not_include_it",
        "tests/system/vmd/test_save.py::test_a_file_that_cannot_be_written",
    ),
    "a program has to parse what is printed for people": (
        "tests/unit/vmctl/test_commands.py::test_json_of_what_has_become_of_a_vm",
        "tests/kvm/test_run.py::test_json_and_console_log",
        "tests/system/vmd/test_client.py::test_a_life",
        "tests/system/vmd/test_client.py::test_the_example",
    ),
    "an abbreviation of OpenBSD's verbs is taken for a verb of ours": (
        "tests/unit/vmctl/test_verbs.py::test_shortest_prefixes",
        "tests/unit/vmctl/test_verbs.py::test_every_prefix",
        "tests/unit/vmctl/test_verbs.py::test_prefixes_of_ours",
    ),
    "doctor does not mention what the daemon and networks need": (
        "tests/unit/vmctl/test_doctor.py::test_programs",
        "tests/unit/vmctl/test_doctor.py::test_the_daemon",
        "tests/unit/vmctl/test_doctor.py::test_memory_and_what_nothing_uses",
    ),
    "the documentation shows what does not work": (
        "tests/unit/test_tutorial.py::test_commands_are_right",
        "tests/unit/test_tutorial.py::test_steps_of_the_tutorial",
        "tests/unit/config/test_manual.py::test_examples_are_right",
        "tests/guest/test_tutorial.py::test_the_tutorial",
    ),
    "a guest prints faster than anybody reads": (
        "tests/kvm/test_run.py::test_slow_reader_holds_the_guest",
        "tests/kvm/test_run.py::test_a_guest_that_reboots_is_held_by_its_reader",
    ),
    # No faults of ours, but tested since
    "large discs, tags, groups, discards, reboots, kexec": (
        "tests/unit/scsi/test_cdrom.py::test_a_disc_of_more_than_4_gib",
        "tests/system/test_taps.py::test_tagged_frames_and_groups",
        "tests/guest/test_net.py::test_tags_and_groups",
        "tests/guest/test_disks.py::test_a_file_system_survives_a_reboot",
        "tests/guest/test_linux.py::test_each_way_to_reboot_is_one",
        "tests/guest/test_requests.py::test_kexec",
        "tests/unit/devices/test_mc146818.py::test_alarms",
    ),
}
"""Each kind of fault, and its tests by their places in the tree."""

HELD: Final[frozenset[str]] = frozenset(
    (
        "tests/system/test_taps.py::test_tagged_frames_and_groups",
        "tests/system/vmd/test_closed_streams.py::test_a_closed_descriptor_is_never_a_disk",
        "tests/system/vmd/test_console.py::test_a_console_that_stays_attached_shows_nothing_twice",
        "tests/system/vmd/test_passt.py::test_without_passt",
        "tests/system/vmd/test_tools.py::test_packer",
        "tests/system/vmd/test_tools.py::test_syzkaller",
        "tests/unit/devices/test_mc146818.py::test_alarms",
        "tests/unit/scsi/test_cdrom.py::test_a_disc_of_more_than_4_gib",
    )
)
"""Tests that passed before as well: the daemon had /dev/null as its descriptors, a console repeated
its history one time in ten, and the rest is what was tried and held."""
