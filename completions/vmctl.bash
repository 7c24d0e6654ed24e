# Completion of vmctl for bash: verbs, options, names of VMs, files.
# Made by scripts/completions.py from vmctl/line/verbs.py: change that, and run it.

_vmctl_vms() {
	vmctl status 2>/dev/null | awk 'NR > 1 { print $9 }'
}

# Prints what a word stands for among the verbs of OpenBSD, or else among ours.
_vmctl_verb() {
	local word=$1 verb found=()
	for verb in console create load log pause receive reload reset send show start status stop unpause wait clone connect cp doctor events exec gdb help image list migrate run snapshot ssh ssh-config top metrics web; do
		[[ $verb == "$word" ]] && printf '%s' "$verb" && return
	done
	for verb in console create load log pause receive reload reset send show start status stop unpause wait; do
		[[ $verb == "$word"* ]] && found+=("$verb")
	done
	if [[ ${#found[@]} -eq 0 ]]; then
		for verb in clone connect cp doctor events exec gdb help image list migrate run snapshot ssh ssh-config top metrics web; do
			[[ $verb == "$word"* ]] && found+=("$verb")
		done
	fi
	[[ ${#found[@]} -eq 1 ]] && printf '%s' "${found[0]}"
}

# Offers words, and names of VMs and files where <vm> and <file> are among them.
_vmctl_offer() {
	local word=$1 one words=()
	shift
	COMPREPLY=()
	for one in "$@"; do
		case $one in
		'<vm>') mapfile -t -O ${#words[@]} words < <(_vmctl_vms) ;;
		'<file>')
			compopt -o filenames
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
			;;
		*) words+=("$one") ;;
		esac
	done
	mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -W "${words[*]}" -- "$word")
}

_vmctl() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} verb= second= i
	local options=() operands=()

	for ((i = 1; i < COMP_CWORD; i++)); do
		[[ ${COMP_WORDS[i]} == -* ]] && continue
		if [[ -z $verb ]]; then
			verb=$(_vmctl_verb "${COMP_WORDS[i]}")
			[[ -z $verb ]] && verb=${COMP_WORDS[i]}
		elif [[ -z $second ]]; then
			second=${COMP_WORDS[i]}
		fi
	done
	if [[ -z $verb ]]; then
		_vmctl_offer "$word" console create load log pause receive reload reset send show start status stop unpause wait clone connect cp doctor events exec gdb help image list migrate run snapshot ssh ssh-config top metrics web --help --version -H -v
		return
	fi
	case $verb in
	image)
		set -- check info list prune pull resize rm
		;;
	*) set -- ;;
	esac
	if [[ $# -gt 0 ]]; then
		if [[ -z $second ]]; then
			_vmctl_offer "$word" "$@" --help
			return
		fi
		for i in "$@"; do
			[[ $i == "$second"* ]] && second=$i
		done
		verb="$verb $second"
	fi

	case "$verb $before" in
	'clone -n')
		_vmctl_offer "$word"
		return
		;;
	'clone --timeout')
		_vmctl_offer "$word"
		return
		;;
	'clone --wait')
		_vmctl_offer "$word" 'ready'
		return
		;;
	'clone '*)
		options=(-n --json --timeout --wait)
		operands=('<vm>')
		;;
	'connect '*)
		options=()
		operands=('<vm>')
		;;
	'console '*)
		options=()
		operands=('<vm>')
		;;
	'cp '*)
		options=(-r)
		operands=('<file>')
		;;
	'create -b')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'create -i')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'create -s')
		_vmctl_offer "$word"
		return
		;;
	'create '*)
		options=(-b -i -s)
		operands=('<file>')
		;;
	'doctor '*)
		options=(--json)
		operands=()
		;;
	'events '*)
		options=(--json)
		operands=()
		;;
	'exec -C')
		_vmctl_offer "$word"
		return
		;;
	'exec -e')
		_vmctl_offer "$word"
		return
		;;
	'exec -u')
		_vmctl_offer "$word"
		return
		;;
	'exec --timeout')
		_vmctl_offer "$word"
		return
		;;
	'exec '*)
		options=(-C -e -i -t -u --timeout)
		operands=('<vm>')
		;;
	'gdb '*)
		options=(--stdio)
		operands=('<vm>')
		;;
	'help '*)
		options=()
		operands=('clone' 'connect' 'console' 'cp' 'create' 'doctor' 'events' 'exec' 'gdb' 'help' 'image' 'list' 'load' 'log' 'migrate' 'pause' 'receive' 'reload' 'reset' 'run' 'send' 'show' 'snapshot' 'ssh' 'ssh-config' 'start' 'status' 'stop' 'top' 'metrics' 'web' 'unpause' 'wait')
		;;
	'image check '*)
		options=(--json)
		operands=('<file>')
		;;
	'image info '*)
		options=(--json)
		operands=('<file>')
		;;
	'image list '*)
		options=(--json)
		operands=()
		;;
	'image prune '*)
		options=()
		operands=()
		;;
	'image pull --digest')
		_vmctl_offer "$word"
		return
		;;
	'image pull --limit')
		_vmctl_offer "$word"
		return
		;;
	'image pull --sums')
		_vmctl_offer "$word"
		return
		;;
	'image pull --timeout')
		_vmctl_offer "$word"
		return
		;;
	'image pull '*)
		options=(--digest --limit --sums --timeout)
		operands=()
		;;
	'image resize '*)
		options=(--shrink)
		operands=('<file>')
		;;
	'image rm '*)
		options=()
		operands=()
		;;
	'list '*)
		options=(-r --json)
		operands=()
		;;
	'load '*)
		options=()
		operands=('<file>')
		;;
	'log '*)
		options=(-f --json)
		operands=('brief' 'verbose' '<vm>')
		;;
	'migrate --downtime')
		_vmctl_offer "$word"
		return
		;;
	'migrate --timeout')
		_vmctl_offer "$word"
		return
		;;
	'migrate --on-timeout')
		_vmctl_offer "$word" 'cancel' 'force'
		return
		;;
	'migrate --ssh')
		_vmctl_offer "$word"
		return
		;;
	'migrate '*)
		options=(--downtime --timeout --on-timeout --ssh --copy-storage)
		operands=('<vm>')
		;;
	'pause '*)
		options=()
		operands=('<vm>')
		;;
	'receive '*)
		options=(-p --live --copy-storage)
		operands=()
		;;
	'reload '*)
		options=()
		operands=()
		;;
	'reset '*)
		options=()
		operands=('all' 'switches' 'vms')
		;;
	'run -B')
		_vmctl_offer "$word" 'disk' 'cdrom' 'net'
		return
		;;
	'run -b')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run -d')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run -i')
		_vmctl_offer "$word" 'bridge:' 'none' 'passt' 'stream:' 'tap:' 'vhost-user:'
		return
		;;
	'run -m')
		_vmctl_offer "$word"
		return
		;;
	'run -n')
		_vmctl_offer "$word"
		return
		;;
	'run -p')
		_vmctl_offer "$word"
		return
		;;
	'run -r')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --append')
		_vmctl_offer "$word"
		return
		;;
	'run --cloud-init')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --console-log')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --firmware')
		_vmctl_offer "$word" 'bios' 'uefi' '<file>'
		return
		;;
	'run --forward')
		_vmctl_offer "$word" 'tcp:' 'udp:'
		return
		;;
	'run --from')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --gdb')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --initrd')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --nvram')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --share')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --ssh-key')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --timeout')
		_vmctl_offer "$word"
		return
		;;
	'run --tpm')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'run --vsock')
		_vmctl_offer "$word" 'auto' '<file>'
		return
		;;
	'run --wait')
		_vmctl_offer "$word" 'console='
		return
		;;
	'run '*)
		options=(-B -b -c -d -i -L -m -n -p -r --agent --append --balloon --cloud-init --console-log --firmware --forward --from --gdb --initrd --json --no-reboot --nvram --rw --selftest --share --ssh-key --timeout --tpm --virtio-console --vsock --wait --watchdog)
		operands=()
		;;
	'send '*)
		options=(-l)
		operands=('<vm>')
		;;
	'show '*)
		options=(-r -a --json)
		operands=('<vm>')
		;;
	'snapshot -o')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'snapshot -r')
		_vmctl_offer "$word"
		return
		;;
	'snapshot --check')
		_vmctl_offer "$word"
		return
		;;
	'snapshot --info')
		_vmctl_offer "$word"
		return
		;;
	'snapshot '*)
		options=(-l -o -r --check --info --json --no-disks)
		operands=('<vm>')
		;;
	'ssh -i')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'ssh -l')
		_vmctl_offer "$word"
		return
		;;
	'ssh -o')
		_vmctl_offer "$word"
		return
		;;
	'ssh -p')
		_vmctl_offer "$word"
		return
		;;
	'ssh --ssh')
		_vmctl_offer "$word"
		return
		;;
	'ssh '*)
		options=(-i -l -o -p --ssh)
		operands=('<vm>')
		;;
	'ssh-config '*)
		options=()
		operands=('<vm>')
		;;
	'start -B')
		_vmctl_offer "$word" 'disk' 'cdrom' 'net'
		return
		;;
	'start -b')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start -d')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start -i')
		_vmctl_offer "$word" 'bridge:' 'none' 'passt' 'stream:' 'tap:' 'vhost-user:'
		return
		;;
	'start -m')
		_vmctl_offer "$word"
		return
		;;
	'start -n')
		_vmctl_offer "$word"
		return
		;;
	'start -p')
		_vmctl_offer "$word"
		return
		;;
	'start -r')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start -t')
		_vmctl_offer "$word" '<vm>'
		return
		;;
	'start --append')
		_vmctl_offer "$word"
		return
		;;
	'start --clock')
		_vmctl_offer "$word" 'frozen' 'now'
		return
		;;
	'start --cloud-init')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start --firmware')
		_vmctl_offer "$word" 'bios' 'uefi' '<file>'
		return
		;;
	'start --forward')
		_vmctl_offer "$word" 'tcp:' 'udp:'
		return
		;;
	'start --from')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start --initrd')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start --share')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start --ssh-key')
		_vmctl_offer "$word" '<file>'
		return
		;;
	'start --timeout')
		_vmctl_offer "$word"
		return
		;;
	'start --vsock')
		_vmctl_offer "$word" 'auto' '<file>'
		return
		;;
	'start --wait')
		_vmctl_offer "$word" 'console='
		return
		;;
	'start '*)
		options=(-B -b -c -d -i -L -m -n -p -r -t --agent --append --balloon --clock --cloud-init --firmware --forward --from --initrd --json --save --selftest --share --ssh-key --template --timeout --tpm --vsock --wait --watchdog)
		operands=('<vm>')
		;;
	'status '*)
		options=(-r -a --json)
		operands=('<vm>')
		;;
	'stop '*)
		options=(-a -f -w --json)
		operands=('<vm>')
		;;
	'top -d')
		_vmctl_offer "$word"
		return
		;;
	'top -n')
		_vmctl_offer "$word"
		return
		;;
	'top '*)
		options=(-d -n --json)
		operands=()
		;;
	'metrics '*)
		options=()
		operands=()
		;;
	'web --port')
		_vmctl_offer "$word"
		return
		;;
	'web '*)
		options=(--port)
		operands=()
		;;
	'unpause '*)
		options=(-f)
		operands=('<vm>')
		;;
	'wait --for')
		_vmctl_offer "$word" 'running' 'stopped' 'ready' 'file=' 'port=' 'unit=' 'console='
		return
		;;
	'wait --timeout')
		_vmctl_offer "$word"
		return
		;;
	'wait '*)
		options=(--for --timeout --json)
		operands=('<vm>')
		;;
	esac
	if [[ $word == -* ]]; then
		_vmctl_offer "$word" "${options[@]}" --help
	else
		_vmctl_offer "$word" "${operands[@]}"
	fi
}

complete -F _vmctl vmctl
