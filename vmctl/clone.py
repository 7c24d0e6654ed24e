"""`vmctl clone`: VMs that continue from the state of another one."""

import json
import sys
from collections.abc import Sequence

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    check_name,
    parse_target,
    text_of,
)
from vmctl.messages import fail
from vmctl.values import number_of, once
from vmm_kvm.errors import SpecError
from vmm_kvm.text import printable

_COUNT_MAX = 256


def clone(words: Sequence[str], *, count: tuple[str, ...] = (), as_json: bool = False) -> int:
    """Clone a VM; returns the exit status, which is 1 if a clone does not run.

    Args:
        words: the id or name of the VM, and the name of its clones.
        count: number of clones.
        as_json: print the result for each.
    """
    try:
        target = parse_target(words[0])
        check_name(words[1].replace("%d", "1", 1))
        asked = once(count, "count")
        number = 1 if asked is None else number_of(asked, "count", _COUNT_MAX)
        with Client() as client:
            fields = {**target.fields(), "clone": words[1], "count": number}
            vms: list[Fields] = client.ask("clone", "cloned", fields)["vms"]
    except RefusedError as err:
        return fail(f"clone vm command failed: {err}")
    except (CommandError, SpecError) as err:
        return fail(err)
    for vm in vms:
        name = printable(vm["name"])
        if vm["code"]:
            detail = f": {printable(vm['message'])}" if vm["message"] else ""
            fail(f"clone {name} failed: {text_of(vm['code'])}{detail}")
        else:
            text = f"started vm {vm['id']} ({name}) successfully, tty {printable(vm['tty'])}"
            print(f"vmctl: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps(vms, indent=2))
    return 1 if any(vm["code"] for vm in vms) else 0
