#!/bin/bash
# Run groups of checks in Debian 12, Debian 13 and Debian testing, one after the other.
#
#     scripts/matrix.sh [--suite SUITE]... [GROUP...]
#
# SUITE is bookworm, trixie or testing, by default each of them; GROUP is one of scripts/test.sh,
# by default unit and kvm. mmdebstrap makes a tree for each suite, once, in $VMM_CACHE/trees, or
# ~/.cache/vmm-kvm-tests/trees; remove it to get newer packages. scripts/setup.sh runs in the tree as
# on any machine. The groups test this repository's last commit, with uncommitted changes to tracked
# files.
#
# It prints one line per suite at the end. MATRIX_TIMEOUT bounds each suite, in seconds; 5400 by
# default. The exit status is 0 if all groups passed, 1 if a check failed, 77 if no check failed but a
# tree could not be made, or a suite exceeded its time. Needs root.
set -u -o pipefail
cd "$(dirname "$0")/.."
. scripts/apt_sources.sh

say() { printf 'matrix: %s\n' "$*" >&2; }

suites=()
while [ "${1:-}" = --suite ] && [ $# -ge 2 ]; do
    suites+=("$2")
    shift 2
done
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie testing)
for suite in "${suites[@]}"; do
    case $suite in
        bookworm | trixie | testing) ;;
        *) say "unknown suite: $suite"; exit 2 ;;
    esac
done
[ $# -gt 0 ] || set -- unit kvm
if [ "$(id -u)" != 0 ]; then
    say "needs root: it makes trees and mounts them"
    exit 2
fi
command -v mmdebstrap >/dev/null || { say "mmdebstrap is not installed: run make setup"; exit 2; }

trees=${VMM_CACHE:-$HOME/.cache/vmm-kvm-tests}/trees
place=srv/vmm-kvm  # of the repository, in each tree
limit=${MATRIX_TIMEOUT:-5400}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# The mirror of this machine; without one mmdebstrap uses Debian's own.
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
source=$(debian_source "$codename" | head -n 1)
mirror=${source%%"	"*}

# make_tree SUITE: make its tree, if there is none.
make_tree() {
    local suite=$1 tree=$trees/$1
    [ ! -d "$tree" ] || return 0
    say "making $tree"
    mkdir -p "$trees"
    rm -rf --one-file-system "$tree.part"
    # The index of a mirror may be older than its validity.
    mmdebstrap --quiet --mode=root --variant=apt --include=ca-certificates,git,mount,python3 \
        --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Retries 3' \
        --aptopt='APT::Install-Recommends "false"' \
        "$suite" "$tree.part" ${mirror:+"deb $mirror $suite main"} &&
        mv "$tree.part" "$tree"
}

# copy_repository SUITE: update the tree's clone to this repository, keeping its .venv.
copy_repository() {
    local clone=$trees/$1/$place commit
    commit=$(git -c user.name=matrix -c user.email=matrix@localhost stash create) || return 1
    [ -d "$clone/.git" ] || git init -q "$clone" || return 1
    git push -q --force "$clone" "${commit:-HEAD}:refs/tests/matrix" &&
        git -C "$clone" checkout -q --force --detach refs/tests/matrix &&
        git -C "$clone" clean -q -d --force
}

# The directories in which pip finds packages, if its configuration names any.
pip_directories() {
    { python3 -m pip config list 2>/dev/null; env | grep '^PIP_'; } |
        grep -oE "/[^ '\"]+" | sed 's|^//*|/|; s|/simple/*$||' | sort -u |
        while read -r path; do [ ! -d "$path" ] || echo "$path"; done
}

# This runs in the new mount namespace: the tree becomes its root.
# shellcheck disable=SC2016 # expanded there
enter='
set -e
tree=$1 place=$2 directories=$3
shift 3
mount --bind "$tree" "$tree"
cd "$tree"
mount -t proc proc proc
for each in dev sys; do mount --rbind /$each $each; done
mount -t tmpfs tmpfs run
find tmp -mindepth 1 -delete
for path in $directories; do
    mkdir -p ".$path"
    mount --bind "$path" ".$path"
done
for path in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    [ -e "$path" ] || continue
    rm -f ".$path"
    cp "$path" ".$path"
done
if [ -e "$HOME/.config/pip/pip.conf" ]; then
    mkdir -p root/.config/pip
    cp "$HOME/.config/pip/pip.conf" root/.config/pip
fi
mkdir -p old-root
pivot_root . old-root
umount -l old-root
cd "/$place"
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset VMM_CACHE VIRTUAL_ENV PYTHONPATH
export VMM_NO_CHROMIUM=1
printf "python %s\n" "$(python3 -c "import platform; print(platform.python_version())")"
scripts/setup.sh
scripts/test.sh "$@"
'

# test_in SUITE GROUP...: run the groups. The pid namespace kills remaining processes when its first one
# ends.
test_in() {
    local suite=$1
    shift
    timeout --kill-after=10 "$limit" unshare --mount --propagation private --pid --fork \
        --kill-child bash -c "$enter" enter "$trees/$suite" "$place" "$(pip_directories)" "$@" \
        </dev/null
}

# counted LOG: print the lines of the groups' summary as one.
counted() { sed '1,/^== summary/d' "$1" | tr -d '\r' | paste -sd ';' | sed 's/;/; /g'; }

summary=()
failed=0
for suite in "${suites[@]}"; do
    printf '\n==== %s\n' "$suite"
    log=$logs/$suite start=$SECONDS
    if ! make_tree "$suite"; then
        summary+=("$suite: NOT TESTED: its tree cannot be made; is there a mirror?")
        [ $failed != 0 ] || failed=77
        continue
    fi
    if ! copy_repository "$suite"; then
        summary+=("$suite: FAILED: the repository cannot be copied")
        failed=1
        continue
    fi
    test_in "$suite" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    verdict=ok
    case $status in
        0) ;;
        124 | 137)
            verdict="NOT TESTED: not through after $limit s"
            [ $failed != 0 ] || failed=77
            ;;
        *) verdict=FAILED failed=1 ;;
    esac
    python=$(sed -n 's/^python //p' "$log" | head -n 1)
    summary+=("$suite (Python ${python:-unknown}): $verdict after $((SECONDS - start)) s: $(counted "$log")")
done

printf '\n==== summary\n'
printf '%s\n' "${summary[@]}"
exit $failed
