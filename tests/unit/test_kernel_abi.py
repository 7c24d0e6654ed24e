"""The table of KVM's interface agrees with the installed kernel headers, in every field."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vmm_kvm.kvm import abi, ioctl, sev_abi

# Padding has other names in other headers, or has become part of a union (the `pad` of
# `kvm_run.hypercall`, since 6.12): sizes and the offsets of other fields hold it in place.
_PADDING = re.compile(r"pad(ding)?\d*|reserved\d*")

# Newer than the headers of Linux 6.1; any other missing name is a mistake in the table.
NEWER_THAN_6_1 = frozenset({"KVM_EXIT_MEMORY_FAULT"})

_SCALARS = (
    ctypes.c_uint8,
    ctypes.c_uint16,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int32,
    ctypes.c_int64,
)
_Data = type[ctypes.Structure] | type[ctypes.Union]


def _structures(table: ModuleType = abi) -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in vars(table).items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == table.__name__
    }


def _constants(table: ModuleType = abi) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(table).items()
        if isinstance(value, int) and name.isupper()
    }


def _fields(data: _Data, path: str = "", base: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield every field except padding, also of nameless structures.

    Each is its path as in C, C expressions, and their values.

    The expressions are printf arguments for `%zu %zu %c`: offset, bytes and signedness of the
    field, or of one element if it is an array, whose length follows from the next field's offset.
    """
    anonymous = getattr(data, "_anonymous_", ())
    for field in data._fields_:
        name, kind = field[0], field[1]
        if _PADDING.fullmatch(name):
            continue
        offset = base + getattr(data, name).offset
        if name in anonymous:
            assert issubclass(kind, ctypes.Structure | ctypes.Union)
            yield from _fields(kind, path, offset)
            continue
        member, size, shown, sign = "{0}", ctypes.sizeof(kind), "'-'", "-"
        if kind in _SCALARS:
            shown, sign = "SIGN({0})", "su"[getattr(kind(-1), "value", 0) > 0]
        elif issubclass(kind, ctypes.Array):
            member, size = "{0}[0]", ctypes.sizeof(vars(kind)["_type_"])
        yield f"{path}{name}", f"sizeof({member}), {shown}", f"{offset} {size} {sign}"
        if issubclass(kind, ctypes.Structure | ctypes.Union) and "." in kind.__qualname__:
            yield from _fields(kind, f"{path}{name}.", offset)


def _program(
    structures: dict[str, type[ctypes.Structure]],
    constants: dict[str, int],
    members: Iterable[str] = (),
) -> str:
    """Write the C program that prints the headers' facts, a line each.

    `members` are the constants that are members of enumerations, which no preprocessor knows.
    """
    lines = [
        "#include <stddef.h>",
        "#include <stdio.h>",
        "#include <linux/kvm.h>",
        "#include <linux/psp-sev.h>",
        "#define SIGN(x) ((__typeof__(x))-1 < (__typeof__(x))1 ? 's' : 'u')",
        "int main(void) {",
    ]
    for name in constants:
        if name in members:
            lines.append(f'printf("{name} %llu\\n", (unsigned long long)({name}));')
            continue
        lines += [
            f"#ifdef {name}",
            f'printf("{name} %llu\\n", (unsigned long long)({name}));',
            "#else",
            f'printf("{name} absent\\n");',
            "#endif",
        ]
    for name, structure in structures.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for path, expressions, _ in _fields(structure):
            values = expressions.format(f"((struct {name} *)0)->{path}")
            lines.append(
                f'printf("{name}.{path} %zu %zu %c\\n", offsetof(struct {name}, {path}), {values});'
            )
    return "\n".join([*lines, "return 0;", "}", ""])


def _expected(
    structures: dict[str, type[ctypes.Structure]], constants: dict[str, int]
) -> dict[str, str]:
    """Return the same facts from the table."""
    facts = {name: str(value) for name, value in constants.items()}
    for name, structure in structures.items():
        facts[name] = str(ctypes.sizeof(structure))
        facts |= {f"{name}.{path}": values for path, _, values in _fields(structure)}
    return facts


def disagreements(
    structures: dict[str, type[ctypes.Structure]],
    constants: dict[str, int],
    directory: Path,
    members: Iterable[str] = (),
) -> list[str]:
    """Compile and run the program; return one line per fact in which table and headers differ."""
    source, program = directory / "abi.c", directory / "abi"
    source.write_text(_program(structures, constants, members))
    done = subprocess.run(
        ["gcc", "-o", str(program), str(source)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return [line for line in done.stderr.splitlines() if "error:" in line]
    shown = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    headers = dict(line.split(" ", 1) for line in shown.splitlines())
    return [
        f"{name}: table {value}, headers {headers.get(name)}"
        for name, value in _expected(structures, constants).items()
        if headers.get(name) != value
        and not (headers.get(name) == "absent" and name in NEWER_THAN_6_1)
    ]


def test_table_agrees_with_headers(tmp_path: Path) -> None:
    """Every structure, field, request and constant equals that of <linux/kvm.h>."""
    assert disagreements(_structures(), _constants(), tmp_path) == []


# Since Linux 6.10, where <asm/kvm.h> has them; a macro of it tells.
_WITH_TYPES = frozenset({"KVM_SEV_INIT2", "kvm_sev_init"})


def test_sev_table_agrees_with_headers(tmp_path: Path) -> None:
    """So do those of encrypted guests, as far as the installed headers are new enough."""
    structures, constants = _structures(sev_abi), _constants(sev_abi)
    probe = "#include <linux/kvm.h>\n#ifdef KVM_X86_SEV_VM\nyes\n#endif\n"
    command = ["gcc", "-E", "-P", "-xc", "-"]
    seen = subprocess.run(command, input=probe, check=True, capture_output=True, text=True).stdout
    if "yes" not in seen.split():
        structures = {k: v for k, v in structures.items() if k not in _WITH_TYPES}
        types = {name for name in constants if name.startswith("KVM_X86_")}
        newer = _WITH_TYPES | types | {"KVM_CAP_VM_TYPES"}
        constants = {k: v for k, v in constants.items() if k not in newer}
    members = [name for name in constants if name.startswith(("KVM_SEV_", "SEV_RET_"))]
    members.append("SEV_PLATFORM_STATUS")
    assert disagreements(structures, constants, tmp_path, members) == []
    wrong = {"KVM_SEV_LAUNCH_MEASURE": 7, "SEV_ISSUE_CMD": 0}
    expected = [
        "KVM_SEV_LAUNCH_MEASURE: table 7, headers 6",
        f"SEV_ISSUE_CMD: table 0, headers {sev_abi.SEV_ISSUE_CMD}",
    ]
    assert disagreements({}, wrong, tmp_path, ["KVM_SEV_LAUNCH_MEASURE"]) == expected


def test_table_is_looked_at() -> None:
    """The comparison covers the table: structures, nested fields and requests."""
    facts = _expected(_structures(), _constants())
    for name in ("KVM_RUN", "KVM_CAP_IRQCHIP", "kvm_run.io.data_offset", "kvm_irq_level.irq"):
        assert name in facts
    assert len(facts) > 500


class kvm_dtable(ctypes.Structure):  # noqa: N801 - the C name, laid out wrongly on purpose
    """The limit is too wide."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("padding", ctypes.c_uint16 * 2),
    )


class kvm_clock_data(ctypes.Structure):  # noqa: N801 - same
    """Two fields are swapped."""

    _fields_ = (
        ("clock", ctypes.c_uint64),
        ("pad0", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("realtime", ctypes.c_uint64),
        ("host_tsc", ctypes.c_uint64),
        ("pad", ctypes.c_uint32 * 4),
    )


class kvm_pit_channel_state(ctypes.Structure):  # noqa: N801 - same
    """The time has lost its sign."""

    _fields_ = (*abi.kvm_pit_channel_state._fields_[:-1], ("count_load_time", ctypes.c_uint64))


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        (kvm_dtable, "kvm_dtable.limit: table 8 4 u, headers 8 2 u"),
        (kvm_clock_data, "kvm_clock_data.flags: table 12 4 u, headers 8 4 u"),
        (
            kvm_pit_channel_state,
            "kvm_pit_channel_state.count_load_time: table 16 8 u, headers 16 8 s",
        ),
    ],
)
def test_wrong_structure_is_caught(
    wrong: type[ctypes.Structure], fact: str, tmp_path: Path
) -> None:
    """A structure of the right size with a wrong field is reported by that field's name."""
    assert fact in disagreements({wrong.__name__: wrong}, {}, tmp_path)


def test_unknown_names_are_caught(tmp_path: Path) -> None:
    """A structure or field that the headers lack, and a wrong or absent constant, are reported."""
    unknown = type("kvm_invented", (ctypes.Structure,), {"_fields_": (("x", ctypes.c_uint8),)})
    assert disagreements({"kvm_invented": unknown}, {}, tmp_path) != []
    wrong = {"KVM_RUN": 1, "KVM_CAP_INVENTED": 2}
    expected = [
        f"KVM_RUN: table 1, headers {abi.KVM_RUN}",
        "KVM_CAP_INVENTED: table 2, headers absent",
    ]
    assert expected == disagreements({}, wrong, tmp_path)


def test_requests_have_names() -> None:
    """Every request of the table is named in error messages."""
    assert ioctl.operation(abi.KVM_SET_USER_MEMORY_REGION) == "KVM_SET_USER_MEMORY_REGION"
    assert ioctl.operation(abi.KVM_REGISTER_COALESCED_MMIO) == "KVM_REGISTER_COALESCED_MMIO"
    assert ioctl.operation(abi.KVM_IRQ_LINE_STATUS) == "KVM_IRQ_LINE_STATUS"
    assert ioctl.operation(0x1234) == "ioctl 0x1234"


def test_with_entries_keeps_the_header() -> None:
    """A structure with entries begins like its header and is as much longer as the entries."""
    table = abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, 3)
    assert ctypes.sizeof(table) == ctypes.sizeof(abi.kvm_cpuid2) + 3 * ctypes.sizeof(
        abi.kvm_cpuid_entry2
    )
    assert table is abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, 3)
