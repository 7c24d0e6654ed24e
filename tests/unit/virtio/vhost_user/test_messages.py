"""The codec of vhost-user's messages: sizes, round trips, and refusals."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_kvm.virtio.vhost_user.messages import (
    CONFIG_MAX,
    PAYLOAD_MAX,
    REGIONS_MAX,
    ConfigAccess,
    Header,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VhostUserError,
    VringAddress,
    VringState,
    pack_region,
    pack_regions,
    pack_u64,
    request_name,
    unpack_region,
    unpack_regions,
    unpack_u64,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
REGION = st.builds(MemoryRegion, U64, U64, U64, U64)


@settings(deadline=None)
@given(U32, U32)
def test_a_ring_state_survives_the_wire(index: int, num: int) -> None:
    """A ring state is decoded as encoded."""
    assert VringState.unpack(VringState(index, num).pack()) == VringState(index, num)


@settings(deadline=None)
@given(st.builds(VringAddress, U32, U32, U64, U64, U64, U64))
def test_ring_addresses_survive_the_wire(address: VringAddress) -> None:
    """Ring addresses are decoded as encoded."""
    assert VringAddress.unpack(address.pack()) == address


@settings(deadline=None)
@given(st.lists(REGION, max_size=REGIONS_MAX))
def test_a_memory_table_survives_the_wire(regions: list[MemoryRegion]) -> None:
    """A memory table is decoded as encoded, also with unused regions after it."""
    assert unpack_regions(pack_regions(regions)) == regions
    assert unpack_regions(pack_regions(regions) + bytes(32 * (8 - len(regions)))) == regions


@settings(deadline=None)
@given(REGION)
def test_a_single_region_survives_the_wire(region: MemoryRegion) -> None:
    """The region of ADD_MEM_REG has 8 bytes of padding before it."""
    assert len(pack_region(region)) == 40
    assert unpack_region(pack_region(region)) == region


@settings(deadline=None)
@given(U64)
def test_a_number_survives_the_wire(value: int) -> None:
    """A 64-bit number is decoded as encoded."""
    assert unpack_u64(pack_u64(value)) == value


@settings(deadline=None)
@given(st.integers(0, 200), U32, st.binary(max_size=56))
def test_a_config_access_survives_the_wire(offset: int, flags: int, data: bytes) -> None:
    """A piece of configuration space is decoded as encoded."""
    access = ConfigAccess(offset, flags, data)
    assert ConfigAccess.unpack(access.pack()) == access


@pytest.mark.parametrize("size", [0, 4, 7, 9])
def test_a_payload_of_another_size_is_refused(size: int) -> None:
    """A shorter or longer payload is not accepted as a number or a ring state."""
    with pytest.raises(VhostUserError, match=f"payload of {size} bytes, not 8"):
        unpack_u64(bytes(size))
    with pytest.raises(VhostUserError, match=f"payload of {size} bytes, not 8"):
        VringState.unpack(bytes(size))


def test_a_table_of_too_many_regions_is_refused() -> None:
    """The count is checked against the limit and against the payload."""
    region = MemoryRegion(0, 1, 0, 0)
    with pytest.raises(VhostUserError, match="9 memory regions in a payload of 296 bytes"):
        unpack_regions(pack_regions([region] * 9))
    with pytest.raises(VhostUserError, match="2 memory regions in a payload of 71 bytes"):
        unpack_regions(pack_regions([region] * 2)[:-1])
    with pytest.raises(VhostUserError, match="payload of 7 bytes"):
        unpack_regions(bytes(7))


def test_a_config_access_out_of_range_is_refused() -> None:
    """Configuration space has 256 bytes, and the size must be the payload's."""
    with pytest.raises(VhostUserError, match=r"configuration space 0xff\+0x2: out of range"):
        ConfigAccess.unpack(ConfigAccess(CONFIG_MAX - 1, 0, b"ab").pack())
    with pytest.raises(VhostUserError, match=r"configuration space 0x0\+0x2: out of range"):
        ConfigAccess.unpack(ConfigAccess(0, 0, b"ab").pack()[:-1])
    with pytest.raises(VhostUserError, match="payload of 11 bytes, not 12 or more"):
        ConfigAccess.unpack(bytes(11))


def test_a_header_of_another_version_is_refused() -> None:
    """The version is in the lowest two bits of the flags."""
    assert Header.unpack(Header(1, 0x9, 8).pack()) == Header(1, 0x9, 8)
    with pytest.raises(VhostUserError, match="protocol version 2, not 1"):
        Header.unpack(Header(1, 0xA, 8).pack())


def test_a_header_with_a_huge_payload_is_refused() -> None:
    """A header with more payload than any message has is refused at once."""
    with pytest.raises(VhostUserError, match="SET_MEM_TABLE: payload of 1025 bytes"):
        Header.unpack(Header(Request.SET_MEM_TABLE, 1, PAYLOAD_MAX + 1).pack())


def test_requests_have_names() -> None:
    """Errors name a request as the specification does."""
    assert request_name(5) == "SET_MEM_TABLE"
    assert request_name(99) == "request 99"


def test_the_structures_are_those_of_linux(tmp_path: Path) -> None:
    """Ring states and addresses are laid out as in <linux/vhost_types.h>."""
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <linux/vhost_types.h>\n#include <stdio.h>\n#include <stddef.h>\n"
        'int main(void) { printf("%zu %zu %zu %zu %zu %zu",'
        " sizeof(struct vhost_vring_state), sizeof(struct vhost_vring_addr),"
        " offsetof(struct vhost_vring_addr, desc_user_addr),"
        " offsetof(struct vhost_vring_addr, used_user_addr),"
        " offsetof(struct vhost_vring_addr, avail_user_addr),"
        " offsetof(struct vhost_vring_addr, log_guest_addr)); }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "sizes", source], check=True)
    shown = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True)
    packed = VringAddress(1, 2, 3, 4, 5, 6).pack()
    numbers = {value: packed.index(bytes([value])) for value in (3, 4, 5, 6)}
    expected = [8, len(packed), numbers[3], numbers[4], numbers[5], numbers[6]]
    assert [int(word) for word in shown.stdout.split()] == expected
    assert ctypes.sizeof(ctypes.c_uint64) == len(pack_u64(0))


def test_protocol_features_have_the_specified_bits() -> None:
    """Bit numbers are those of the specification's table."""
    bits = {feature.name: feature.value.bit_length() - 1 for feature in ProtocolFeature}
    assert bits == {
        "MQ": 0,
        "LOG_SHMFD": 1,
        "REPLY_ACK": 3,
        "CONFIG": 9,
        "RESET_DEVICE": 13,
        "CONFIGURE_MEM_SLOTS": 15,
        "STATUS": 16,
    }
