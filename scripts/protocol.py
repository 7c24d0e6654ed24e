"""Make docs/protocol.md from the message types of vmd/wire/messages.py.

Without arguments, print it; with --write, write it to its place. A test compares.
"""

import ast
import enum
import inspect
import sys
import typing
from pathlib import Path
from types import UnionType

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vmd.config.model import BootDevice, GuestClock  # noqa: E402 - same
from vmd.wire import messages, parts, ports, transfers  # noqa: E402 - found by the line above
from vmd.wire.channel import FDS_MAX, MESSAGE_MAX  # noqa: E402 - same
from vmm_kvm.standard_streams import run_program  # noqa: E402 - same

PAGE = ROOT / "docs" / "protocol.md"
_SIMPLE = {int: "integer", str: "string", bool: "boolean", float: "number", type(None): "null"}
_INTRODUCTION = """\
# The control protocol

<!-- Made from vmd/wire/messages.py: change that, and run scripts/protocol.py --write. -->

Version {version}. `vmctl` speaks it with `vmd`, and any program may: `examples/client.c` does so
in C.

- **The socket** is `/run/vmd.sock`, or `$XDG_RUNTIME_DIR/vmd.sock` of `vmd --user`: a UNIX socket
  of type `SOCK_SEQPACKET`. Each packet is one message: a JSON object in UTF-8 of at most
  {size} KiB, with at most {fds} descriptors beside it (`SCM_RIGHTS`).
- **A client's user**: the daemon learns it from the kernel (`SO_PEERCRED`).
- **`type`** names the message. A request may have a `serial`, any number, which its answer repeats:
  several requests may be under way at a time. A field with a default may be left out. The daemon
  refuses fields that it does not know; a client ignores them.
- **Every request gets exactly one answer**, `failed` if it fails. A list of VMs may come in parts:
  as long as `has_more` is true, another `vms` follows. After the answer to `events` come `event`s,
  until the client closes the connection.
- **An invalid request** is answered with `failed`, and the connection is closed.
- **`version`** in a request is the version of the protocol that the client means. A daemon that
  does not speak it answers `failed` with the code `version`. Within a version, fields are only
  added.

```
→ {{"type": "start", "serial": 1, "name": "web"}}
← {{"type": "started", "serial": 1, "id": 3, "pid": 4711, "tty": "/dev/pts/5"}}
```
"""


def page() -> str:
    """Return the whole page."""
    documentation = {
        **attribute_documentation(Path(parts.__file__).read_text()),
        **attribute_documentation(Path(transfers.__file__).read_text()),
        **attribute_documentation(Path(ports.__file__).read_text()),
        **attribute_documentation(Path(messages.__file__).read_text()),
    }
    made = [
        _INTRODUCTION.format(version=parts.PROTOCOL_VERSION, size=MESSAGE_MAX >> 10, fds=FDS_MAX)
    ]
    made.append("## Requests\n")
    made += [_message(each, documentation) for each in typing.get_args(messages.AnyRequest)]
    made.append("## Answers\n")
    made += [_message(each, documentation) for each in typing.get_args(messages.AnyAnswer)]
    made.append("## Parts of messages\n")
    structs = (
        *(
            parts.DiskRequest,
            parts.ShareRequest,
            messages.InterfaceRequest,
            transfers.ReceivedInterface,
            transfers.ClonedVm,
            messages.ForwardRequest,
            transfers.SnapshotInfo,
        ),
        *(
            messages.VmInfo,
            messages.DiskInfo,
            parts.ShareInfo,
            messages.EndInfo,
            messages.InterfaceInfo,
            messages.ForwardInfo,
        ),
        *(parts.Statistics, parts.MemoryUse, parts.Moved, parts.Exits, messages.LogLine),
    )
    made += [_message(each, documentation) for each in structs]
    made.append("## Words\n")
    words = (
        *(messages.ErrorCode, messages.State, messages.EndCause, messages.EventKind),
        *(messages.ResetMode, BootDevice, GuestClock),
    )
    made += [_words(each, documentation) for each in words]
    return "\n".join(made)


def _message(kind: type[msgspec.Struct], documentation: dict[tuple[str, str], str]) -> str:
    tag = kind.__struct_config__.tag
    title = f"`{tag}`" if tag is not None else kind.__name__
    lines = [f"### {title}\n", _paragraphs(kind), ""]
    fields = [
        field
        for field in msgspec.structs.fields(kind)
        if field.name not in {"serial", "version"} or tag is None
    ]
    if fields:
        lines += ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "required" if field.required else f"`{_json(field.default)}`"
        meaning = next(
            (
                documentation[base.__name__, field.name]
                for base in kind.__mro__
                if (base.__name__, field.name) in documentation
            ),
            "",
        )
        lines.append(f"| `{field.encode_name}` | {_type(field.type)} | {default} | {meaning} |")
    return "\n".join(lines) + ("\n" if fields else "")


def _words(kind: type[enum.StrEnum], documentation: dict[tuple[str, str], str]) -> str:
    lines = [f"### {kind.__name__}\n", _paragraphs(kind), ""]
    for member in kind:
        meaning = documentation.get((kind.__name__, member.name), "")
        lines.append(f"- `{member.value}`{': ' + meaning if meaning else ''}")
    return "\n".join(lines) + "\n"


def _paragraphs(kind: type) -> str:
    """Return the paragraphs of a docstring, each on one line, without the source."""
    # Python 3.13 removes the indentation of docstrings at compile time; cleandoc does so for all.
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return "\n\n".join(line for line in lines if not line.startswith("Source:"))


def _type(wanted: object) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _type(arguments[0]) + _bounds(arguments[1:])
    if origin is tuple:
        return f"array of {_type(arguments[0])}"
    if origin in {typing.Union, UnionType}:
        return " or ".join(map(_type, arguments))
    if isinstance(wanted, type) and wanted in _SIMPLE:
        return _SIMPLE[wanted]
    assert isinstance(wanted, type), wanted
    return wanted.__name__


def _bounds(metas: tuple[object, ...]) -> str:
    told = []
    for meta in metas:
        assert isinstance(meta, msgspec.Meta)
        if meta.le is not None and meta.le < 1 << 62:
            told.append(f"{meta.ge} to {meta.le}")
        if meta.max_length is not None:
            told.append(f"at most {meta.max_length}")
        if meta.pattern is not None:
            assert meta.pattern == parts.WITHOUT_NULL
            told.append("no null character")
    return f" ({', '.join(told)})" if told else ""


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def attribute_documentation(source: str) -> dict[tuple[str, str], str]:
    """Return the docstring after each attribute, by class and name."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, behind in zip(node.body, node.body[1:], strict=False):
            match statement, behind:
                case (
                    (ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)])),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[node.name, name] = " ".join(text.split())
    return found


def main() -> int:
    """Print the page, or write it."""
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    run_program("protocol", main)
