# Completion of vmctl for fish: verbs, options, names of VMs, files.
# Made by scripts/completions.py from vmctl/verbs.py: change that, and run it.

function __vmctl_vms
	vmctl status 2>/dev/null | awk 'NR > 1 { print $9 }'
end

complete -c vmctl -f
complete -c vmctl -n __fish_use_subcommand -s v -d 'Log what happens, in detail.'
complete -c vmctl -n __fish_use_subcommand -l version -d 'Print the version.'
complete -c vmctl -l help -d 'Tell how it is used.'
complete -c vmctl -n __fish_use_subcommand -a console -d 'Attach to the console of a VM.'
complete -c vmctl -n __fish_use_subcommand -a create -d 'Create a disk image: empty, as an overlay, or as a copy of another disk.'
complete -c vmctl -n __fish_use_subcommand -a doctor -d 'Tell whether this host can run VMs, how fast, and what is missing.'
complete -c vmctl -n __fish_use_subcommand -a events -d 'Print what happens to VMs, as it happens.'
complete -c vmctl -n __fish_use_subcommand -a help -d 'Tell what commands there are, or how one is used.'
complete -c vmctl -n __fish_use_subcommand -a image -d 'Tell about disk images.'
complete -c vmctl -n __fish_use_subcommand -a load -d 'Let the daemon read another configuration file in addition.'
complete -c vmctl -n __fish_use_subcommand -a log -d 'Let the daemon log little or much.'
complete -c vmctl -n __fish_use_subcommand -a pause -d 'Let a VM stand still.'
complete -c vmctl -n __fish_use_subcommand -a receive -d 'Receive a VM that was sent; not supported yet.'
complete -c vmctl -n __fish_use_subcommand -a reload -d 'Let the daemon read its configuration again; VMs that run stay as they are.'
complete -c vmctl -n __fish_use_subcommand -a reset -d 'End all VMs, or forget switches, or both.'
complete -c vmctl -n __fish_use_subcommand -a run -d 'Run a VM in the foreground, its console on this terminal, without a daemon.'
complete -c vmctl -n __fish_use_subcommand -a send -d 'Send a VM to another host; not supported yet.'
complete -c vmctl -n __fish_use_subcommand -a show -d 'List VMs, as status does, and the network interfaces of one.'
complete -c vmctl -n __fish_use_subcommand -a start -d 'Start a VM that exists, or make one and start it.'
complete -c vmctl -n __fish_use_subcommand -a status -d 'List VMs.'
complete -c vmctl -n __fish_use_subcommand -a stop -d 'Stop a VM.'
complete -c vmctl -n __fish_use_subcommand -a top -d 'Show what VMs use, again and again.'
complete -c vmctl -n __fish_use_subcommand -a unpause -d 'Let a paused VM go on.'
complete -c vmctl -n __fish_use_subcommand -a wait -d 'Wait until a VM ends or reboots.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info' -a check -d 'Tell whether a disk image is sound; the exit status is 1 if it is not.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info' -a info -d 'Tell what a disk image is: format, sizes, bases, snapshots.'
complete -c vmctl -n '__fish_seen_subcommand_from console' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s b -d 'Make an overlay on this qcow2 image.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s i -d 'Copy this disk into the new image.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s s -d 'Size of the disk, such as 10G.' -x
complete -c vmctl -n '__fish_seen_subcommand_from create' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from doctor' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from events' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from help' -a 'console create doctor events help image load log pause receive reload reset run send show start status stop top unpause wait'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from check' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from check' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from info' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from info' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from load' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from log' -a 'brief verbose'
complete -c vmctl -n '__fish_seen_subcommand_from pause' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from reset' -a 'all switches vms'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s B -d 'What firmware boots from.' -x -a 'disk cdrom net'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s b -d 'Kernel or firmware image to boot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s c -d 'Accepted and ignored: the console is always attached.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s d -d 'Disk image; may be repeated. Options: ro, serial=text, queues=count.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s i -d 'Network interface, or how many; may be repeated.' -x -a 'bridge: none passt stream: tap: vhost-user:'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s L -d 'Add an interface with user-mode networking by passt.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s m -d 'Memory, such as 256M or 4G; 512M by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s n -d 'Add an interface on a bridge of this host.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s p -d 'Number of vCPUs, 1 to 64.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s r -d 'ISO image in the CD-ROM drive.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l append -d 'Kernel command line.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -l console-log -d 'Write what the console shows to this file too.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l firmware -d 'Boot firmware; bios is the default where there are disks or an ISO image.' -x -a 'bios uefi (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l initrd -d 'Initial RAM disk; for a Multiboot kernel a module, and may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l json -d 'Print how it ended as JSON, behind the console\'s output.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l no-reboot -d 'End when the guest reboots, instead of booting again.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l nvram -d 'File that keeps the variables of UEFI firmware; made if it is missing.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l selftest -d 'Boot the self-test guest that comes along.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l timeout -d 'Kill the VM after this time; status 124.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -l virtio-console -d 'Add a virtio console, hvc0, which takes the input once its driver is ready.'
complete -c vmctl -n '__fish_seen_subcommand_from send' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from show' -s r -d 'Only VMs that run.'
complete -c vmctl -n '__fish_seen_subcommand_from show' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from show' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s B -d 'What the VM boots from.' -x -a 'disk cdrom net'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s b -d 'Kernel or firmware image to boot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s c -d 'Attach the console.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s d -d 'Disk image; may be repeated. Options: ro, serial=text, queues=count.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s i -d 'Number of network interfaces.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s L -d 'Add a local network interface.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s m -d 'Memory, such as 256M or 4G; 512M by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s n -d 'Add a network interface on a switch.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s p -d 'Number of vCPUs, 1 to 64.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s r -d 'ISO image in the CD-ROM drive.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s t -d 'Make an instance of this VM.' -x -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l append -d 'Kernel command line.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -l firmware -d 'Boot firmware.' -x -a 'bios uefi (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l initrd -d 'Initial RAM disk; for a Multiboot kernel a module, and may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from status' -s r -d 'Only VMs that run.'
complete -c vmctl -n '__fish_seen_subcommand_from status' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from status' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from stop' -s a -d 'Every VM that runs, starts or waits for its turn.'
complete -c vmctl -n '__fish_seen_subcommand_from stop' -s f -d 'Without asking the guest.'
complete -c vmctl -n '__fish_seen_subcommand_from stop' -s w -d 'Wait until it has ended.'
complete -c vmctl -n '__fish_seen_subcommand_from stop' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from stop' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from top' -s d -d 'Time between two looks; 1 by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from top' -s n -d 'How often to look.' -x
complete -c vmctl -n '__fish_seen_subcommand_from top' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from unpause' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l for -d 'Wait for another condition than its end.' -x -a 'running stopped console='
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l timeout -d 'Wait no longer.' -x
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from wait' -a '(__vmctl_vms)'
