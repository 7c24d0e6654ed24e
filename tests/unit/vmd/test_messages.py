"""Messages: all round-trip, each direction takes only its own, and their bytes do not change."""

from __future__ import annotations

import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.wire import device, forking, internal, local, messages
from vmd.wire.encoding import Wire, WireEncoding, WireError

UNIONS = {
    "request": (messages.AnyRequest, WireEncoding.JSON),
    "answer": (messages.AnyAnswer, WireEncoding.JSON),
    "control to parent": (internal.ControlToParent, WireEncoding.MSGPACK),
    "parent to control": (internal.ParentToControl, WireEncoding.MSGPACK),
    "parent to vmm": (internal.ParentToVmm, WireEncoding.MSGPACK),
    "vmm to parent": (internal.VmmToParent, WireEncoding.MSGPACK),
    "parent to priv": (internal.ParentToPriv, WireEncoding.MSGPACK),
    "priv to parent": (internal.PrivToParent, WireEncoding.MSGPACK),
    "parent to local": (local.ParentToLocal, WireEncoding.MSGPACK),
    "vmm to device": (device.VmmToDevice, WireEncoding.MSGPACK),
    "vmm to zygote": (forking.VmmToZygote, WireEncoding.MSGPACK),
    "zygote to vmm": (forking.ZygoteToVmm, WireEncoding.MSGPACK),
    "vmm to vm": (internal.VmCommand, WireEncoding.MSGPACK),
    "vm to vmm": (internal.VmReport, WireEncoding.MSGPACK),
}
MESSAGES = [
    pytest.param(message, union, encoding, id=f"{name}: {message.__name__}")
    for name, (union, encoding) in UNIONS.items()
    for message in typing.get_args(union)
]


def _example(kind: type) -> object:
    """Make a message with a value in every field, nested messages included."""
    fields: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        fields[field.encode_name] = _example_of(field.type)
    return kind(**fields)


def _example_of(wanted: object) -> object:
    origin = typing.get_origin(wanted)
    arguments = typing.get_args(wanted)
    if origin is typing.Annotated:
        least = getattr(arguments[1], "ge", None)
        return max(1, least) if arguments[0] is int and least else _example_of(arguments[0])
    if origin is tuple:
        return tuple(_example_of(each) for each in arguments if each is not ...)
    if arguments:  # a union
        return _example_of(arguments[0])
    if isinstance(wanted, type) and issubclass(wanted, msgspec.Struct):
        return _example(wanted)
    if hasattr(wanted, "_make"):  # a record of the configuration
        return wanted._make(map(_example_of, typing.get_type_hints(wanted).values()))
    if isinstance(wanted, type) and hasattr(wanted, "__members__"):
        return list(wanted)[-1]  # type: ignore[call-overload] # an enumeration
    return {int: 1, str: "text", bool: True, float: 1.5}[wanted]  # type: ignore[index] # a type


@pytest.mark.parametrize(("message", "union", "encoding"), MESSAGES)
def test_every_message_survives_the_wire(
    message: type, union: object, encoding: WireEncoding
) -> None:
    """Every message is decoded as encoded, with any fields."""
    wire: Wire[object, object] = Wire(union, encoding)
    sent = _example(message)
    assert wire.decode(wire.encode(sent)) == sent


@pytest.mark.parametrize(("message", "union", "encoding"), MESSAGES)
def test_no_message_is_taken_from_the_wrong_side(
    message: type, union: object, encoding: WireEncoding
) -> None:
    """A message of another sender is not understood."""
    data = Wire[object, object](union, encoding).encode(_example(message))
    for other, other_encoding in UNIONS.values():
        if message in typing.get_args(other) or other_encoding is not encoding:
            continue
        wire: Wire[object, object] = Wire(other, encoding)
        with pytest.raises(WireError):
            wire.decode(data)


@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(UNIONS)))
def test_random_bytes_are_never_more_than_an_error(data: bytes, name: str) -> None:
    """A decoder raises one exception, of one line."""
    union, encoding = UNIONS[name]
    wire: Wire[object, object] = Wire(union, encoding)
    problem = ""
    try:
        wire.decode(data)
    except WireError as err:
        problem = str(err)
    assert "\n" not in problem


@pytest.mark.parametrize(
    "request_", ['{"type":"load","path":"%s"}', '{"type":"start","disks":[{"path":"%s"}]}']
)
def test_no_path_has_a_null_character(request_: str) -> None:
    """No call of the daemon's would take one: it is no request."""
    decode = messages.DAEMON_TO_CLIENT.decode
    decode((request_ % r"/a\nb").encode())
    for path in (r"/a\u0000b", r"\u0000", r"/a\u0000\n", r"\n\u0000"):
        with pytest.raises(WireError):
            decode((request_ % path).encode())


def test_requests_look_as_documented() -> None:
    """The bytes of a request, which clients in other languages write, do not change."""
    encode = messages.CLIENT_TO_DAEMON.encode
    assert encode(messages.Status(serial=1)) == b'{"type":"status","serial":1}'
    assert (
        encode(messages.Stop(name="web", wait=True)) == b'{"type":"stop","name":"web","wait":true}'
    )
    assert encode(messages.Reset(mode=messages.ResetMode.VMS)) == b'{"type":"reset","mode":"vms"}'


def test_answers_say_all_fields() -> None:
    """An answer has every field, for clients in languages without defaults."""
    encode = messages.DAEMON_TO_CLIENT.encode
    assert encode(messages.Done()) == b'{"type":"done","serial":0,"id":0}'
    vm = messages.VmInfo(id=1, name="web", state=messages.State.STOPPED, cpus=1, memory=1 << 29)
    assert encode(messages.Vms(vms=(vm,))) == (
        b'{"type":"vms","serial":0,"vms":[{"id":1,"name":"web","state":"stopped","cpus":1,'
        b'"memory":536870912,"memory_used":null,"pid":null,"tty":"","pause_reason":"","uid":0,"gid":null,'
        b'"is_from_config":false,"started_at":null,"clone_of":"","is_template":false,"has_tpm":false,"after":[],"last_end":null,"statistics":null,"interfaces":[],"boot":"","append":null,"disks":[],"cdrom":"","shares":[]}],"has_more":false}'
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"status","id":-1}',
        '{"type":"status","id":4294967296}',
        '{"type":"status","id":true}',
        '{"type":"status","id":"1"}',
        '{"type":"start","memory":1e99}',
        '{"type":"start","kernel":253}',
        '{"type":"start","disks":[{"path":"/x","queues":0}]}',
        '{"type":"start","boot_device":"tape"}',
        '{"type":"load"}',
        '{"type":"load","path":1}',
        '{"type":"nothing"}',
        '{"serial":1}',
        "null",
    ],
)
def test_values_out_of_range_are_refused(text: str) -> None:
    """The decoder checks every bound, so that later code need not."""
    with pytest.raises(WireError):
        messages.DAEMON_TO_CLIENT.decode(text.encode())
