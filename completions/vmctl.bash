# Completion of vmctl for bash: verbs, options, names of VMs, files.
# In zsh it works behind `autoload bashcompinit && bashcompinit`.

_vmctl_vms() {
	vmctl status 2>/dev/null | awk 'NR > 1 { print $9 }'
}

_vmctl() {
	local verbs='console create doctor events image load log pause receive reload reset run
		send show start status stop top unpause wait'
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} verb= candidate
	local candidates=() i

	for ((i = 1; i < COMP_CWORD; i++)); do
		case ${COMP_WORDS[i]} in
		-*) ;;
		*)
			verb=${COMP_WORDS[i]}
			break
			;;
		esac
	done
	COMPREPLY=()
	if [[ -z $verb ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$verbs -v --help" -- "$word")
		return
	fi
	# A verb may be shortened: the first that it can be decides.
	for candidate in $verbs; do
		[[ $candidate == "$verb"* ]] && candidates+=("$candidate")
	done
	[[ ${#candidates[@]} -eq 1 ]] && verb=${candidates[0]}

	case $before in
	-b | -d | -r | --initrd | --nvram | -i)
		[[ $verb == start && $before == -i ]] || compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -f -- "$word")
		return
		;;
	-B)
		mapfile -t COMPREPLY < <(compgen -W 'disk cdrom net' -- "$word")
		return
		;;
	--firmware)
		mapfile -t COMPREPLY < <(compgen -W 'bios uefi' -f -- "$word")
		return
		;;
	-t)
		mapfile -t COMPREPLY < <(compgen -W "$(_vmctl_vms)" -- "$word")
		return
		;;
	--for)
		mapfile -t COMPREPLY < <(compgen -W 'running stopped console=' -- "$word")
		return
		;;
	esac

	local options=
	case $verb in
	events) options='--json' ;;
	show | status) options='-r --json' ;;
	start) options='-B -b -c -d -i -L -m -n -p -r -t --append --firmware --initrd' ;;
	stop) options='-a -f -w' ;;
	top) options='--json -d -n' ;;
	wait) options='--for --timeout' ;;
	esac
	if [[ $word == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$options --help" -- "$word")
		return
	fi
	case $verb in
	console | pause | send | show | start | status | stop | unpause | wait)
		mapfile -t COMPREPLY < <(compgen -W "$(_vmctl_vms)" -- "$word")
		;;
	log) mapfile -t COMPREPLY < <(compgen -W 'brief verbose' -- "$word") ;;
	reset) mapfile -t COMPREPLY < <(compgen -W 'all switches vms' -- "$word") ;;
	image) mapfile -t COMPREPLY < <(compgen -W 'check info' -f -- "$word") ;;
	create | load | run)
		compopt -o filenames
		mapfile -t COMPREPLY < <(compgen -f -- "$word")
		;;
	esac
}

complete -F _vmctl vmctl
