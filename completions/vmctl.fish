# Completion of vmctl for fish: verbs, options, names of VMs, files.
# Made by scripts/completions.py from vmctl/line/verbs.py: change that, and run it.

function __vmctl_vms
	vmctl status 2>/dev/null | awk 'NR > 1 { print $9 }'
end

complete -c vmctl -f
complete -c vmctl -n __fish_use_subcommand -s v -d 'Log what happens, in detail.'
complete -c vmctl -n __fish_use_subcommand -l version -d 'Print the version.'
complete -c vmctl -l help -d 'Tell how it is used.'
complete -c vmctl -n __fish_use_subcommand -a clone -d 'Make VMs that go on where another one stands.'
complete -c vmctl -n __fish_use_subcommand -a connect -d 'Be standard input and output of a guest\'s port, by vsock or by its agent.'
complete -c vmctl -n __fish_use_subcommand -a console -d 'Attach to the console of a VM.'
complete -c vmctl -n __fish_use_subcommand -a cp -d 'Copy a file or a directory into a guest, or out of it, by its agent.'
complete -c vmctl -n __fish_use_subcommand -a create -d 'Create a disk image: empty, as an overlay, or as a copy of another disk.'
complete -c vmctl -n __fish_use_subcommand -a doctor -d 'Tell whether this host can run VMs, how fast, and what is missing.'
complete -c vmctl -n __fish_use_subcommand -a events -d 'Print what happens to VMs, as it happens.'
complete -c vmctl -n __fish_use_subcommand -a exec -d 'Run a command in a guest, by its agent.'
complete -c vmctl -n __fish_use_subcommand -a gdb -d 'Debug a VM\'s guest with GDB, which takes the arguments.'
complete -c vmctl -n __fish_use_subcommand -a help -d 'Tell what commands there are, or how one is used.'
complete -c vmctl -n __fish_use_subcommand -a image -d 'Get, describe, check and resize disk images.'
complete -c vmctl -n __fish_use_subcommand -a list -d 'Print the names of the VMs that the configuration has.'
complete -c vmctl -n __fish_use_subcommand -a load -d 'Let the daemon read another configuration file in addition.'
complete -c vmctl -n __fish_use_subcommand -a log -d 'Let the daemon log little or much, or print what it has logged of a VM.'
complete -c vmctl -n __fish_use_subcommand -a migrate -d 'Hand a VM over to another host, while it runs.'
complete -c vmctl -n __fish_use_subcommand -a pause -d 'Pause a VM.'
complete -c vmctl -n __fish_use_subcommand -a receive -d 'Receive a VM that was sent, from standard input.'
complete -c vmctl -n __fish_use_subcommand -a reload -d 'Let the daemon read its configuration again; VMs that run stay as they are.'
complete -c vmctl -n __fish_use_subcommand -a reset -d 'End all VMs, or forget switches, or both.'
complete -c vmctl -n __fish_use_subcommand -a run -d 'Run a VM in the foreground, its console on this terminal, without a daemon.'
complete -c vmctl -n __fish_use_subcommand -a send -d 'Send a VM to standard output, for vmctl receive, and end it.'
complete -c vmctl -n __fish_use_subcommand -a show -d 'List VMs, as status does, or tell all of one: disks, interfaces, how it ended.'
complete -c vmctl -n __fish_use_subcommand -a snapshot -d 'Make a snapshot of a VM, which goes on; or list, describe or remove those there are.'
complete -c vmctl -n __fish_use_subcommand -a ssh -d 'Log in to a guest by ssh, which needs no address.'
complete -c vmctl -n __fish_use_subcommand -a ssh-config -d 'Print lines for ssh_config(5), by which ssh reaches a VM, or each of them.'
complete -c vmctl -n __fish_use_subcommand -a start -d 'Start a VM that exists, or make one and start it.'
complete -c vmctl -n __fish_use_subcommand -a status -d 'List VMs.'
complete -c vmctl -n __fish_use_subcommand -a stop -d 'Stop a VM.'
complete -c vmctl -n __fish_use_subcommand -a top -d 'Show what VMs use, again and again.'
complete -c vmctl -n __fish_use_subcommand -a metrics -d 'Print what VMs use, as text for OpenMetrics.'
complete -c vmctl -n __fish_use_subcommand -a web -d 'Serve a page for this user\'s browser, on 127.0.0.1.'
complete -c vmctl -n __fish_use_subcommand -a unpause -d 'Let a paused VM continue.'
complete -c vmctl -n __fish_use_subcommand -a wait -d 'Wait until a VM ends or reboots.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a check -d 'Tell whether a disk image is sound; the exit status is 1 if it is not.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a info -d 'Tell what a disk image is: format, sizes, bases, snapshots.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a list -d 'Print the images that were pulled.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a prune -d 'Remove images without a name, what was pulled in part, and seeds that no VM needs.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a pull -d 'Get an image, by a known name or an address, and check its digest.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a resize -d 'Make a disk image larger, or smaller.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and not __fish_seen_subcommand_from check info list prune pull resize rm' -a rm -d 'Remove images that were pulled.'
complete -c vmctl -n '__fish_seen_subcommand_from clone' -s n -d 'How many; each has another number for %d.' -x
complete -c vmctl -n '__fish_seen_subcommand_from clone' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from clone' -l timeout -d 'With --wait: wait no longer.' -x
complete -c vmctl -n '__fish_seen_subcommand_from clone' -l wait -d 'Wait until each clone\'s agent has renewed entropy, clock and identity; else it is killed.' -x -a 'ready'
complete -c vmctl -n '__fish_seen_subcommand_from clone' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from connect' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from console' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from cp' -s r -d 'Copy a directory, with all that is in it.'
complete -c vmctl -n '__fish_seen_subcommand_from cp' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s b -d 'Make an overlay on this qcow2 image.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s i -d 'Copy this disk into the new image.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from create' -s s -d 'Size of the disk, such as 10G.' -x
complete -c vmctl -n '__fish_seen_subcommand_from create' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from doctor' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from events' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from exec' -s C -d 'Where it runs; the user\'s home by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from exec' -s e -d 'Add this variable; may be repeated.' -x
complete -c vmctl -n '__fish_seen_subcommand_from exec' -s i -d 'Pass on standard input; else it reads /dev/null.'
complete -c vmctl -n '__fish_seen_subcommand_from exec' -s t -d 'Give it a terminal.'
complete -c vmctl -n '__fish_seen_subcommand_from exec' -s u -d 'Run it as this user of the guest; root by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from exec' -l timeout -d 'End it after this time; status 124.' -x
complete -c vmctl -n '__fish_seen_subcommand_from exec' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from gdb' -l stdio -d 'Be what gdb talks to, on standard input and output.'
complete -c vmctl -n '__fish_seen_subcommand_from gdb' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from help' -a 'clone connect console cp create doctor events exec gdb help image list load log migrate pause receive reload reset run send show snapshot ssh ssh-config start status stop top metrics web unpause wait'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from check' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from check' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from info' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from info' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from list' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from pull' -l digest -d 'It has this digest.' -x
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from pull' -l limit -d 'Take no more than this; 64G by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from pull' -l sums -d 'Its digest is in this list.' -x
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from pull' -l timeout -d 'Give up after this time without data.' -x
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from resize' -l shrink -d 'Allow that the end of the disk is lost.'
complete -c vmctl -n '__fish_seen_subcommand_from image; and __fish_seen_subcommand_from resize' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from list' -s r -d 'Only VMs that run.'
complete -c vmctl -n '__fish_seen_subcommand_from list' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from load' -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from log' -s f -d 'Go on with what is logged from now on.'
complete -c vmctl -n '__fish_seen_subcommand_from log' -l json -d 'Print each line as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from log' -a 'brief verbose (__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -l downtime -d 'How long it may stand still; 300.' -x
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -l timeout -d 'How long to wait until that is enough.' -x
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -l on-timeout -d 'What then: cancel, or let it stand still for longer.' -x -a 'cancel force'
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -l ssh -d 'The command to use for ssh, with its options.' -x
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -l copy-storage -d 'Copy disks that the other host lacks.'
complete -c vmctl -n '__fish_seen_subcommand_from migrate' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from pause' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from receive' -s p -d 'Let it stand still.'
complete -c vmctl -n '__fish_seen_subcommand_from receive' -l live -d 'Take part in a hand-over, by standard output.'
complete -c vmctl -n '__fish_seen_subcommand_from receive' -l copy-storage -d 'Make the disks that are not here.'
complete -c vmctl -n '__fish_seen_subcommand_from reset' -a 'all switches vms'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s B -d 'What the VM boots from.' -x -a 'disk cdrom net'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s b -d 'Kernel or firmware image to boot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s c -d 'Attach the console; run always does.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s d -d 'Disk image; may be repeated. Options: ro, serial=text, queues=count, error=, snapshot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s i -d 'Number of network interfaces; for run also one of them.' -x -a 'bridge: none passt stream: tap: vhost-user:'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s L -d 'Add a local network interface; for run by passt.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -s m -d 'Memory, such as 256M or 4G; 512M by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s n -d 'Add a network interface on a switch; for run on a bridge of this host.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s p -d 'Number of vCPUs, 1 to 64.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -s r -d 'ISO image in the CD-ROM drive.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l agent -d 'Install vmm-agent in the guest, by cloud-init.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l append -d 'Kernel command line.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -l balloon -d 'Add a memory balloon: what the guest frees, the host gets.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l cloud-init -d 'Let cloud-init in the guest set it up by this.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l console-log -d 'Write what the console shows to this file too.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l firmware -d 'Boot firmware; bios is the default where there are disks or an ISO image.' -x -a 'bios uefi (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l forward -d 'Let a port of this host lead to one of the guest\'s, on its first local interface.' -x -a 'tcp: udp:'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l from -d 'Go on from this snapshot; one with a slash is a file, for run it always is.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l gdb -d 'Let GDB debug the guest through this socket; with wait it begins when GDB lets it.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l initrd -d 'Initial RAM disk; for a Multiboot kernel a module, and may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l no-reboot -d 'End when the guest reboots, instead of booting again.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l nvram -d 'File that keeps the variables of UEFI firmware; made if it is missing.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l rw -d 'Let the command change this host\'s files.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l selftest -d 'Boot the self-test guest that comes along.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l share -d 'Share a directory by virtio-fs, which the guest mounts by its tag; may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l ssh-key -d 'Let the owner of this public key log in, by cloud-init; may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l timeout -d 'Wait no longer; status 124. A VM of run is killed then.' -x
complete -c vmctl -n '__fish_seen_subcommand_from run' -l tpm -d 'Add a TPM, which keeps its secrets in this directory; needs swtpm.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l virtio-console -d 'Add a virtio console, hvc0, which takes the input once its driver is ready.'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l vsock -d 'Add a vsock device; for run, a socket of this path leads to it.' -x -a 'auto (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from run' -l wait -d 'Wait until this has come, such as a text on the console; run ends then.' -x -a 'console='
complete -c vmctl -n '__fish_seen_subcommand_from run' -l watchdog -d 'Add a watchdog, which resets a guest that hangs.'
complete -c vmctl -n '__fish_seen_subcommand_from send' -s l -d 'Let it go on.'
complete -c vmctl -n '__fish_seen_subcommand_from send' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from show' -s r -d 'Only VMs that run.'
complete -c vmctl -n '__fish_seen_subcommand_from show' -s a -d 'Those that are gone too, with addresses and how each ended.'
complete -c vmctl -n '__fish_seen_subcommand_from show' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from show' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -s l -d 'List the snapshots in the daemon\'s store.'
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -s o -d 'Write it into this new file.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -s r -d 'Remove a snapshot of the store.' -x
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -l check -d 'Tell whether a snapshot is sound.' -x
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -l info -d 'Tell what a snapshot is.' -x
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -l json -d 'Print JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -l no-disks -d 'Leave out the disks that the VM writes.'
complete -c vmctl -n '__fish_seen_subcommand_from snapshot' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -s i -d 'A file with a private key.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -s l -d 'The user of the guest; root by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -s o -d 'An option of ssh, as of ssh_config(5).' -x
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -s p -d 'The guest\'s port; 22 by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -l ssh -d 'The command to use for ssh, with its options.' -x
complete -c vmctl -n '__fish_seen_subcommand_from ssh' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from ssh-config' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s B -d 'What the VM boots from.' -x -a 'disk cdrom net'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s b -d 'Kernel or firmware image to boot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s c -d 'Attach the console; run always does.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s d -d 'Disk image; may be repeated. Options: ro, serial=text, queues=count, error=, snapshot.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s i -d 'Number of network interfaces; for run also one of them.' -x -a 'bridge: none passt stream: tap: vhost-user:'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s L -d 'Add a local network interface; for run by passt.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s m -d 'Memory, such as 256M or 4G; 512M by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s n -d 'Add a network interface on a switch; for run on a bridge of this host.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s p -d 'Number of vCPUs, 1 to 64.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -s r -d 'ISO image in the CD-ROM drive.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -s t -d 'Make an instance of this VM.' -x -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l agent -d 'Install vmm-agent in the guest, by cloud-init.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l append -d 'Kernel command line.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -l balloon -d 'Add a memory balloon: what the guest frees, the host gets.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l clock -d 'What the clock of a VM shows that goes on from a snapshot.' -x -a 'frozen now'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l cloud-init -d 'Let cloud-init in the guest set it up by this.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l firmware -d 'Boot firmware; bios is the default where there are disks or an ISO image.' -x -a 'bios uefi (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l forward -d 'Let a port of this host lead to one of the guest\'s, on its first local interface.' -x -a 'tcp: udp:'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l from -d 'Go on from this snapshot; one with a slash is a file, for run it always is.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l initrd -d 'Initial RAM disk; for a Multiboot kernel a module, and may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l save -d 'Make a file of vm.conf.d of the VM, which then stays.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l selftest -d 'Boot the self-test guest that comes along.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l share -d 'Share a directory by virtio-fs, which the guest mounts by its tag; may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l ssh-key -d 'Let the owner of this public key log in, by cloud-init; may be repeated.' -x -a '(__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l template -d 'Once it is paused, it stays so: clones go on from it.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l timeout -d 'Wait no longer; status 124. A VM of run is killed then.' -x
complete -c vmctl -n '__fish_seen_subcommand_from start' -l tpm -d 'Add a TPM, whose secrets vmd keeps; needs swtpm.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l vsock -d 'Add a vsock device; for run, a socket of this path leads to it.' -x -a 'auto (__fish_complete_path)'
complete -c vmctl -n '__fish_seen_subcommand_from start' -l wait -d 'Wait until this has come, such as a text on the console; run ends then.' -x -a 'console='
complete -c vmctl -n '__fish_seen_subcommand_from start' -l watchdog -d 'Add a watchdog, which resets a guest that hangs.'
complete -c vmctl -n '__fish_seen_subcommand_from start' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from status' -s r -d 'Only VMs that run.'
complete -c vmctl -n '__fish_seen_subcommand_from status' -s a -d 'Those that are gone too, with addresses and how each ended.'
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
complete -c vmctl -n '__fish_seen_subcommand_from web' -l port -d 'Where; any port that is free by default.' -x
complete -c vmctl -n '__fish_seen_subcommand_from unpause' -s f -d 'Though it may run on another host.'
complete -c vmctl -n '__fish_seen_subcommand_from unpause' -a '(__vmctl_vms)'
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l for -d 'Wait for another condition than its end.' -x -a 'running stopped ready file= port= unit= console='
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l timeout -d 'Wait no longer; status 124.' -x
complete -c vmctl -n '__fish_seen_subcommand_from wait' -l json -d 'Print what has become of the VM as JSON.'
complete -c vmctl -n '__fish_seen_subcommand_from wait' -a '(__vmctl_vms)'
