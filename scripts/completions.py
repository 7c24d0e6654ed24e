"""Make the completions of vmctl for bash, zsh and fish from its table of verbs.

Without arguments they are written to completions/. A test compares them with the table.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vmctl.line.options import FILE, VM, Option  # noqa: E402 - found by the line above
from vmctl.line.verbs import VERBS, Verb, names  # noqa: E402 - found by the line above
from vmm_kvm.standard_streams import run_program  # noqa: E402 - same

_MADE = "Made by scripts/completions.py from vmctl/line/verbs.py: change that, and run it."
_GLOBAL = ("--help", "--version", "-H", "-v")
_LIST_VMS = "vmctl status 2>/dev/null | awk 'NR > 1 { print $9 }'"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _groups() -> list[str]:
    """Return the first words that begin several verbs."""
    return [word for word in names() if word not in VERBS]


def _words(completes: tuple[str, ...]) -> str:
    return " ".join(one for one in completes if one not in {FILE, VM})


# bash


def bash() -> str:
    """Return the completion for bash."""
    openbsd = " ".join(word for word, is_openbsd in names().items() if is_openbsd)
    ours = " ".join(word for word, is_openbsd in names().items() if not is_openbsd)
    groups = "\n".join(
        f"\t{word})\n\t\tset -- {' '.join(names(word))}\n\t\t;;" for word in _groups()
    )
    cases = "\n".join(_bash_case(verb) for verb in VERBS.values())
    return f"""\
# Completion of vmctl for bash: verbs, options, names of VMs, files.
# {_MADE}

_vmctl_vms() {{
	{_LIST_VMS}
}}

# Prints what a word stands for among the verbs of OpenBSD, or else among ours.
_vmctl_verb() {{
	local word=$1 verb found=()
	for verb in {openbsd} {ours}; do
		[[ $verb == "$word" ]] && printf '%s' "$verb" && return
	done
	for verb in {openbsd}; do
		[[ $verb == "$word"* ]] && found+=("$verb")
	done
	if [[ ${{#found[@]}} -eq 0 ]]; then
		for verb in {ours}; do
			[[ $verb == "$word"* ]] && found+=("$verb")
		done
	fi
	[[ ${{#found[@]}} -eq 1 ]] && printf '%s' "${{found[0]}}"
}}

# Offers words, and names of VMs and files where <vm> and <file> are among them.
_vmctl_offer() {{
	local word=$1 one words=()
	shift
	COMPREPLY=()
	for one in "$@"; do
		case $one in
		'<vm>') mapfile -t -O ${{#words[@]}} words < <(_vmctl_vms) ;;
		'<file>')
			compopt -o filenames
			mapfile -t COMPREPLY < <(compgen -f -- "$word")
			;;
		*) words+=("$one") ;;
		esac
	done
	mapfile -t -O ${{#COMPREPLY[@]}} COMPREPLY < <(compgen -W "${{words[*]}}" -- "$word")
}}

_vmctl() {{
	local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} verb= second= i
	local options=() operands=()

	for ((i = 1; i < COMP_CWORD; i++)); do
		[[ ${{COMP_WORDS[i]}} == -* ]] && continue
		if [[ -z $verb ]]; then
			verb=$(_vmctl_verb "${{COMP_WORDS[i]}}")
			[[ -z $verb ]] && verb=${{COMP_WORDS[i]}}
		elif [[ -z $second ]]; then
			second=${{COMP_WORDS[i]}}
		fi
	done
	if [[ -z $verb ]]; then
		_vmctl_offer "$word" {openbsd} {ours} {" ".join(_GLOBAL)}
		return
	fi
	case $verb in
{groups}
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
{cases}
	esac
	if [[ $word == -* ]]; then
		_vmctl_offer "$word" "${{options[@]}}" --help
	else
		_vmctl_offer "$word" "${{operands[@]}}"
	fi
}}

complete -F _vmctl vmctl
"""


def _bash_case(verb: Verb) -> str:
    lines = []
    for option in verb.taken:
        if option.value:
            offered = " ".join(map(_quoted, option.completes))
            lines += [
                f"\t{_quoted(f'{verb.name} {option.name}')})",
                f'\t\t_vmctl_offer "$word" {offered}'.rstrip(),
                "\t\treturn",
                "\t\t;;",
            ]
    lines += [
        f"\t{_quoted(verb.name + ' ')}*)",
        f"\t\toptions=({' '.join(one.name for one in verb.taken)})",
        f"\t\toperands=({' '.join(map(_quoted, _operands(verb)))})",
        "\t\t;;",
    ]
    return "\n".join(lines)


def _operands(verb: Verb) -> tuple[str, ...]:
    return tuple(names()) if verb.name == "help" else verb.completes


# zsh


def zsh() -> str:
    """Return the completion for zsh."""
    verbs = "\n".join(f"\t\t{_quoted(f'{word}:{_group_help(word)}')}" for word in names())
    cases = "\n".join(_zsh_case(word) for word in names())
    return f"""\
#compdef vmctl
# Completion of vmctl for zsh: verbs, options, names of VMs, files.
# {_MADE}

_vmctl_vms() {{
	local -a vms
	vms=(${{(f)"$({_LIST_VMS})"}})
	compadd -a vms
}}

_vmctl() {{
	local context state state_descr line
	typeset -A opt_args
	local -a verbs
	verbs=(
{verbs}
	)
	_arguments -C -A '-*' \\
		'-v[Log what happens, in detail.]' \\
		'(- *)--help[Tell what commands there are.]' \\
		'(- *)--version[Print the version.]' \\
		'1: :->verb' '*:: :->rest'
	case $state in
	verb) _describe command verbs ;;
	rest)
		case $line[1] in
{cases}
		esac
		;;
	esac
}}

_vmctl "$@"
"""


def _group_help(word: str) -> str:
    return VERBS[word].help if word in VERBS else "Get, describe, check and resize disk images."


def _zsh_case(word: str) -> str:
    if word in VERBS:
        return f"\t\t{word}) _arguments -A '-*' {_zsh_arguments(VERBS[word])} ;;"
    lines = [f"\t\t{word})", "\t\t\tcase $words[2] in"]
    for second in names(word):
        arguments = _zsh_arguments(VERBS[f"{word} {second}"])
        lines.append(
            f"\t\t\t{second}) shift words; (( CURRENT-- )); _arguments -A '-*' {arguments} ;;"
        )
    lines += [f"\t\t\t*) compadd {' '.join(names(word))} ;;", "\t\t\tesac", "\t\t\t;;"]
    return "\n".join(lines)


def _zsh_arguments(verb: Verb) -> str:
    parts = [_zsh_option(option) for option in verb.taken]
    parts.append("'(- *)--help[Tell how it is used.]'")
    if verb.most:
        parts += [_quoted(f"*: :{_zsh_action(_operands(verb))}")]
    return " ".join(parts)


def _zsh_option(option: Option) -> str:
    star = "*" if option.is_repeated else ""
    text = option.help.replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    if not option.value:
        return _quoted(f"{star}{option.name}[{text}]")
    value = option.value.replace(":", "\\:")
    return _quoted(f"{star}{option.name}[{text}]:{value}:{_zsh_action(option.completes)}")


def _zsh_action(completes: tuple[str, ...]) -> str:
    words = _words(completes).replace(":", "\\:")
    if FILE in completes and words:
        return f"{{compadd {words}; _files}}"
    if FILE in completes:
        return "_files"
    if VM in completes:
        return "_vmctl_vms"
    return f"({words})" if words else " "


# fish


def fish() -> str:
    """Return the completion for fish."""
    lines = [
        "# Completion of vmctl for fish: verbs, options, names of VMs, files.",
        f"# {_MADE}",
        "",
        "function __vmctl_vms",
        f"\t{_LIST_VMS}",
        "end",
        "",
        "complete -c vmctl -f",
        "complete -c vmctl -n __fish_use_subcommand -s v -d 'Log what happens, in detail.'",
        "complete -c vmctl -n __fish_use_subcommand -l version -d 'Print the version.'",
        "complete -c vmctl -l help -d 'Tell how it is used.'",
    ]
    for word in names():
        text = _fish_quoted(_group_help(word))
        lines.append(f"complete -c vmctl -n __fish_use_subcommand -a {word} -d {text}")
    for word in _groups():
        seconds = " ".join(names(word))
        condition = (
            f"__fish_seen_subcommand_from {word}; and not __fish_seen_subcommand_from {seconds}"
        )
        for second in names(word):
            text = _fish_quoted(VERBS[f"{word} {second}"].help)
            lines.append(f"complete -c vmctl -n '{condition}' -a {second} -d {text}")
    for verb in VERBS.values():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in verb.name.split())
        begin = f"complete -c vmctl -n '{seen}'"
        for option in verb.taken:
            kind = "-l" if option.name.startswith("--") else "-s"
            name = option.name.lstrip("-")
            line = f"{begin} {kind} {name} -d {_fish_quoted(option.help)}"
            lines.append(line + (f" -x{_fish_offer(option.completes)}" if option.value else ""))
        if verb.most and _operands(verb):
            lines.append(begin + _fish_offer(_operands(verb)))
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _fish_offer(completes: tuple[str, ...]) -> str:
    parts = [_words(completes)]
    if VM in completes:
        parts.append("(__vmctl_vms)")
    if FILE in completes:
        parts.append("(__fish_complete_path)")
    words = " ".join(part for part in parts if part)
    return f" -a {_fish_quoted(words)}" if words else ""


FILES = {"vmctl.bash": bash, "_vmctl": zsh, "vmctl.fish": fish}


def main() -> int:
    """Write the completions."""
    for name, make in FILES.items():
        (ROOT / "completions" / name).write_text(make())
    return 0


if __name__ == "__main__":
    run_program("completions", main)
