"""The guest tests that `make test` runs: each capability of a Linux guest once.

In the rig a guest's boot takes a minute of a slow machine, and all of the guest level more than an
hour. The other tests cover the same capabilities with other kernels, other numbers of vCPUs, other
data paths and other media, and capabilities that the kvm level covers with the self-test guest
(time-outs, second signals, ways to reboot). `make test-guest` and `make test-all` run them all.
"""

from __future__ import annotations

from typing import Final

CORE: Final = {
    "test_agent.py::test_an_agent_in_a_guest": "the guest agent, by vsock",
    "test_boot_paths.py::test_kernel_finds_what_its_protocol_promises[openbsd-i386]": (
        "a way into a kernel that needs all of the processor's modes"
    ),
    "test_daemon.py::test_a_pause_leaves_the_clock_right": "pause under vmd, and the guest's clock",
    "test_daemon.py::test_the_power_button_stops_a_guest": "a graceful stop under vmd",
    "test_daemon_net.py::test_a_local_interface[process]": "vmd's DHCP, and a device process",
    "test_daemon_networks.py::test_a_local_interface": "NAT, DNS and a forwarded port",
    "test_daemon_networks.py::test_two_guests_on_a_switch": "switches, and links that change",
    "test_disks.py::test_a_guest_reads_and_writes[newer-generic]": (
        "disks of all kinds, several queues; a kernel of the newer series"
    ),
    "test_disks.py::test_a_file_system_survives_a_reboot": "a file system, discards, a reboot",
    "test_disks.py::test_more_disks_than_interrupt_pins[intx]": "shared interrupt lines",
    "test_disks.py::test_a_disk_that_is_memory": "virtio-pmem",
    "test_disks.py::test_a_full_host_disk[qcow2]": "a host without room",
    "test_gdb.py::test_a_kernel_stops_at_its_functions": "GDB, breakpoints in memory",
    "test_installed.py::test_debian_boots_twice[pc]": "SeaBIOS, GRUB and an installed Debian",
    "test_linux.py::test_a_kernel_sees_the_machine_that_was_asked_for[cloud-2]": (
        "the machine's description, held against QEMU's; several vCPUs"
    ),
    "test_linux.py::test_a_reboot_stays_in_the_process[generic]": "a reboot; the generic kernel",
    "test_linux.py::test_sigterm_presses_the_power_button[cloud]": "the ACPI power button",
    "test_linux.py::test_a_panic_is_a_crash[cloud]": "a panic, told by pvpanic",
    "test_linux.py::test_the_console_takes_input": "a console, both ways",
    "test_locked.py::test_under_vmd[vhost]": "locked addresses, by the packet filter",
    "test_media.py::test_linux_reads_a_disc": "the CD-ROM",
    "test_media.py::test_linux_knows_entropy_and_identity": "virtio-rng and SMBIOS",
    "test_media.py::test_linux_talks_on_hvc0": "virtio-console",
    "test_media.py::test_uefi_boots_a_disc_and_keeps_variables": "UEFI, and what it keeps",
    "test_net.py::test_a_guest_and_its_host_talk[vhost]": "vhost-net",
    "test_net.py::test_a_guest_and_its_host_talk[thread]": "a device thread for an interface",
    "test_net.py::test_queues_sizes_and_locks": "queue pairs, large packets",
    "test_net.py::test_without_privileges": "passt",
    "test_requests.py::test_processors_an_alarm_and_a_stopped_process": (
        "the RTC's alarm, processors that go and come, a process that is stopped"
    ),
    "test_other_images.py::test_memtest_starts_its_test_on_the_serial_console": "memtest86+",
    "test_vhost_log.py::test_vhost_net_marks_its_writes": "vhost-net's log of what it writes",
    "test_vsock.py::test_both_sides_connect": "virtio-vsock",
}
"""Each core test, by its place below tests/guest, and the capability that it covers."""

WITHOUT: Final = {
    "test_balloon.py": "Linux's driver of balloons: two guests, which take minutes in the rig",
    "test_clones.py": "clones of a guest with an agent, which take minutes",
    "test_cloud_init.py": "a cloud's image on its first boot, which takes minutes",
    "test_pytest_plugin.py": "the pytest plugin: clones in two runs, which take minutes",
    "test_run_command.py": "commands on the host's root: two guests, which take minutes in the rig",
    "test_saved.py": "a saved guest that goes on: a guest that boots twice",
    "test_shares.py": "Linux's driver of shared directories, which takes minutes in the rig",
    "test_tpm.py": "Linux's driver of TPMs, and tools: a guest that boots twice",
    "test_tutorial.py": "the tutorial, to the letter: as long as half of the core",
}
"""Files of guest tests without a test in the core, and the reason."""
