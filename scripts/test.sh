#!/bin/bash
# Run groups of checks, each in its own process, and end with one summary line per group.
#
#     scripts/test.sh lint unit kvm core
#
# `core` and `guest` are the core of the guest level, and all of it; name only one of them.
# `smoke` is the part of `kvm` in which interpreters and distributions differ most.
# Every group runs even if an earlier one failed; the exit status is 1 if any did. If at most three
# tests of a group fail, they run once more, alone, and the summary names those that passed then. Skips
# fail in a level that this machine can run. The guest group runs on the host's KVM if that runs a
# distribution kernel, else in two rigs, one after the other, beside the other groups: one emulated
# processor keeps one core busy.
set -u -o pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
logs=$(mktemp -d)
background=
trap 'rm -rf "$logs"; [ -z "$background" ] || kill -- "-$background" 2>/dev/null' EXIT
summary=()
failed=0

# group NAME COMMAND...: run it visibly, and note its outcome and pytest's counts for the summary.
group() {
    local name=$1 log=$logs/$1 start=$SECONDS verdict=ok counted
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null 2>&1 | tee "$log" || { verdict=FAILED; failed=1; }
    # A group may run pytest more than once: add up.
    counted=$(tr -d '\r' <"$log" | grep -aE '[0-9]+ (passed|failed|error|skipped).* in [0-9.]+s' |
        sed 's/ in [0-9.]*s.*//' | grep -oE '[0-9]+ [a-z]+' |
        awk '{ n[$2] += $1 } END { for (k in n) printf "%s%d %s", (c++ ? ", " : ""), n[k], k }')
    [ -z "$counted" ] || counted=": $counted"
    summary+=("$name: $verdict after $((SECONDS - start)) s$counted")
    mapfile -t second < <(sed -n 's/^passed only the second time: //p' "$log")
    [ -z "${second[*]}" ] || summary+=("$name: only the second time: ${second[*]}")
}

# tests NAME PYTEST'S...: run tests, and repeat failed ones if they are few: some tests measure time,
# and the machine may be busy. A fault of ours fails again, or shows up in the summary often enough.
tests() {
    local cache=$logs/cache-$1 failures=$logs/cache-$1/v/cache/lastfailed status=0 names
    shift
    .venv/bin/pytest -q -o cache_dir="$cache" "$@" || status=$?
    [ $status = 1 ] && [ -e "$failures" ] || return $status
    names=$($python -c '
import json, sys
print("\n".join(json.load(open(sys.argv[1], encoding="utf-8"))))' "$failures")
    [ "$(wc -l <<<"$names")" -le 3 ] || return $status
    printf 'once more, alone:\n%s\n' "$names"
    .venv/bin/pytest -q -o cache_dir="$cache" --last-failed "$@" || return $?
    while read -r name; do printf 'passed only the second time: %s\n' "$name"; done <<<"$names"
}

lint() {
    local status=0
    .venv/bin/ruff check || status=1
    .venv/bin/ruff format --check || status=1
    .venv/bin/mypy || status=1
    return $status
}

# Kicks, the whole life of a machine, of the daemon and its processes, networks without privileges.
smoke_files=(tests/kvm/test_kicks.py tests/kvm/test_machine.py tests/kvm/test_run.py
    tests/system/vmd/test_life.py tests/system/vmd/test_passt.py)

# in_rig PYTEST'S...: run guest tests in a rig of their own.
in_rig() {
    VMD_REQUIRE=kvm,guest tests/rig/rig run --cpus 1 --timeout 5400 --project -- \
        .venv/bin/pytest -q --color=no --timeout 300 -p no:cacheprovider -m "$guests" "$@"
}

# in_rigs PYTEST'S...: the same, and repeat failed tests in another rig if they are few: by a fault of
# QEMU's emulation a guest in the rig can hang (docs/testing.md). A fault of ours fails again.
in_rigs() {
    local log status=0 again
    log=$(mktemp -p "$logs")
    in_rig "$@" 2>&1 | tee "$log" || status=1
    mapfile -t again < <(tr -d '\r' <"$log" | sed -n 's/^FAILED \([^ ]*\).*/\1/p')
    [ "${#again[@]}" -ge 1 ] && [ "${#again[@]}" -le 3 ] || return $status
    echo "once more, in another rig: ${again[*]}"
    in_rig "${again[@]}"
}

# The files of guest tests for the first rig, and for the second: about the same time each.
first_files() {
    printf 'tests/guest/test_%s.py\n' boot_paths daemon daemon_net daemon_networks disks linux
}

second_files() {
    find tests/guest -name 'test_*.py' | grep -vxF "$(first_files)" | sort
}

# The guest group; it runs beside the others.
guest_tests() {
    local status=0
    if [ "$guests_run_here" = yes ]; then
        echo "guests run on this machine's KVM"
        VMD_REQUIRE=kvm,guest .venv/bin/pytest -q -m "$guests" tests/guest
        return
    fi
    echo "this machine's KVM runs no distribution kernel: guests run in rigs, one after the other"
    # shellcheck disable=SC2046 # a list of names
    in_rigs $(first_files) || status=1
    # shellcheck disable=SC2046 # the same
    in_rigs $(second_files) || status=1
    return $status
}

start_guest() {
    guests_run_here=$($python -m tests.host)
    set -m
    { guest_tests >"$logs/guest.out" 2>&1 </dev/null; echo $? >"$logs/guest.status"; } &
    background=$!
    set +m
}

finish_guest() {
    while [ ! -e "$logs/guest.status" ]; do sleep 1; done
    cat "$logs/guest.out"
    [ "$(cat "$logs/guest.status")" = 0 ]
}

guests=
case " $* " in
    *" guest "*) guests=guest ;;
    *" core "*) guests='guest and core' ;;
esac

# Unit tests parse kernels too. If a download fails here, the tests report it again.
case " $* " in
    *" unit "* | *" guest "* | *" core "*) $python -m tests.artifacts || failed=1 ;;
esac
[ -z "$guests" ] || $python -m tests.debian >/dev/null || failed=1
[ "$guests" != guest ] || $python -m tests.cloud_image >/dev/null || failed=1

# Require the levels that this machine can run: a skip would hide that a test did not run.
required=$($python -c '
from tests import host
print(",".join(name for name, missing in (("kvm", host.missing_kvm()), ("root", host.missing_root()))
               if missing is None))')
export VMD_REQUIRE=$required

[ -z "$guests" ] || start_guest
for name; do
    case $name in
        lint) group lint lint ;;
        unit) group unit tests unit -m 'not kvm and not guest' ;;
        kvm) group kvm tests kvm -m 'kvm and not guest' ;;
        smoke) group smoke tests smoke -m 'kvm and not guest' "${smoke_files[@]}" ;;
        core | guest) group "$name" finish_guest; background= ;;
        *) echo "test.sh: unknown group: $name" >&2; exit 2 ;;
    esac
done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $failed
