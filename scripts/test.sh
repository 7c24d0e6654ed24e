#!/bin/bash
# Run groups of checks, each in its own process, and end with one summary line per group.
#
#     scripts/test.sh lint unit kvm guest
#
# Every group runs even if an earlier one failed; the exit status is 1 if any did. A level that
# this machine can run may not be skipped. The guest group runs on the host's KVM where that runs
# a distribution kernel, else all of it in one boot of the rig.
set -u -o pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
summary=()
failed=0

# group NAME COMMAND...: run it visibly, remember its outcome and what pytest counted.
group() {
    local name=$1 log=$logs/$1 start=$SECONDS verdict=ok counted
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null 2>&1 | tee "$log" || { verdict=FAILED; failed=1; }
    counted=$(tr -d '\r' <"$log" | grep -aE '^=*.*[0-9]+ (passed|failed|error|skipped).* in [0-9.]+s' |
        tail -n 1 | sed 's/^=* *//; s/ *=*$//')
    [ -z "$counted" ] || counted=": $counted"
    summary+=("$name: $verdict after $((SECONDS - start)) s$counted")
}

lint() {
    local status=0
    .venv/bin/ruff check || status=1
    .venv/bin/ruff format --check || status=1
    .venv/bin/mypy || status=1
    return $status
}

in_rig() {
    VMD_REQUIRE=kvm,guest tests/rig/rig run --cpus 1 --timeout 1500 --project --out "$logs/rig" -- \
        .venv/bin/pytest -q --color=no -m guest tests/guest "$@"
}

guest() {
    if [ "$($python -m tests.host)" = yes ]; then
        echo "guests run on this machine's KVM"
        VMD_REQUIRE=kvm,guest .venv/bin/pytest -q -m guest tests/guest
    else
        echo "this machine's KVM runs no distribution kernel: guests run in the rig"
        # What failed is run once more, in a rig of its own: a test that sends two SIGTERMs at once
        # sees one in five pairs become one signal, and its guest then runs on.
        in_rig -o cache_dir=/run/rig/out/cache && return
        [ -s "$logs/rig/cache/v/cache/lastfailed" ] || return 1
        echo "guest: again, what failed: $(tr -d '\n' <"$logs/rig/cache/v/cache/lastfailed")"
        in_rig -o "cache_dir=$logs/rig/cache" --last-failed
    fi
}

# Kernels are parsed by unit tests too. What cannot be fetched is said again by the tests.
case " $* " in
    *" unit "* | *" guest "*) $python -m tests.artifacts || failed=1 ;;
esac

# What this machine has is required: a skip would hide that a test did not run.
required=$($python -c '
from tests import host
print(",".join(name for name, missing in (("kvm", host.missing_kvm()), ("root", host.missing_root()))
               if missing is None))')
export VMD_REQUIRE=$required

for name; do
    case $name in
        lint) group lint lint ;;
        unit) group unit .venv/bin/pytest -q -m 'not kvm and not guest' ;;
        kvm) group kvm .venv/bin/pytest -q -m 'kvm and not guest' ;;
        guest) group guest guest ;;
        *) echo "test.sh: unknown group: $name" >&2; exit 2 ;;
    esac
done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $failed
