"""The CD-ROM drive: its answers to drivers' commands, and to any others."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.scsi import mmc, spc
from vmm_kvm.scsi.cdrom import CdRom
from vmm_kvm.scsi.mmc import BLOCK_SIZE
from vmm_kvm.scsi.spc import Check, Data, Extent, Sense

BLOCKS = 1000
TEST_UNIT_READY = bytes(6)
EJECT = bytes.fromhex("1b 00 00 00 02 00")
LOAD = bytes.fromhex("1b 00 00 00 03 00")
LOCK = bytes.fromhex("1e 00 00 00 01 00")
UNLOCK = bytes.fromhex("1e 00 00 00 00 00")
READ_CAPACITY = bytes.fromhex("25 00 00000000 0000 00 00")
POLL = bytes.fromhex("4a 01 0000 10 0000 0008 00")
NEEDING_A_MEDIUM = (
    TEST_UNIT_READY,
    READ_CAPACITY,
    bytes.fromhex("08 000000 01 00"),
    bytes.fromhex("28 00 00000000 00 0001 00"),
    bytes.fromhex("a8 00 00000000 00000001 00 00"),
    bytes.fromhex("88 00 0000000000000000 00000001 00 00"),
    bytes.fromhex("9e 10 0000000000000000 00000020 00 00"),
    bytes.fromhex("2b 00 00000000 00000000"),
    bytes.fromhex("43 00 00 000000 00 000c 00"),
    bytes.fromhex("51 00 0000000000 0022 00"),
)


@pytest.fixture
def drive() -> CdRom:
    """A drive with a medium of 1000 blocks."""
    return CdRom(BLOCKS * BLOCK_SIZE)


def data(drive: CdRom, cdb: str | bytes) -> bytes:
    """Execute a command that succeeds with data; return them."""
    outcome = drive.execute(bytes.fromhex(cdb) if isinstance(cdb, str) else cdb)
    assert isinstance(outcome, Data), outcome
    return outcome.data


def sense(drive: CdRom, cdb: str | bytes) -> Sense:
    """Execute a command that fails; return its sense data."""
    outcome = drive.execute(bytes.fromhex(cdb) if isinstance(cdb, str) else cdb)
    assert isinstance(outcome, Check), outcome
    return outcome.sense


def test_inquiry_says_who_it_is(drive: CdRom) -> None:
    """INQUIRY reports a removable CD drive with OpenBSD's names."""
    answer = data(drive, "12 00 00 0024 00")
    assert len(answer) == 36
    assert answer[:2] == b"\x05\x80"
    assert answer[4] == len(answer) - 5
    assert answer[8:] == b"OpenBSD VMM CD-ROM      001 "


def test_inquiry_is_cut_to_what_was_asked_for(drive: CdRom) -> None:
    """INQUIRY data are cut to the allocation length: SeaBIOS asks for 36 bytes, others for 5."""
    assert data(drive, "12 00 00 0005 00") == data(drive, "12 00 00 0024 00")[:5]


def test_vital_product_data(drive: CdRom) -> None:
    """Pages 0, 80h and 83h exist; the first lists them all, and each has its length."""
    assert data(drive, "12 01 00 00ff 00") == bytes.fromhex("05 00 0003 00 80 83")
    assert data(drive, "12 01 80 00ff 00") == b"\x05\x80\x00\x07vmm-cd0"
    identification = data(drive, "12 01 83 00ff 00")
    assert int.from_bytes(identification[2:4], "big") == len(identification) - 4
    assert identification[4:8] == bytes((2, 1, 0, len(identification) - 8))
    assert identification[8:] == b"OpenBSD VMM CD-ROM      vmm-cd0"


@pytest.mark.parametrize("cdb", ["12 01 b0 00ff 00", "12 00 80 00ff 00", "12 02 00 0024 00"])
def test_inquiry_without_such_a_page(drive: CdRom, cdb: str) -> None:
    """A missing page, or a page without EVPD, is an invalid field."""
    assert sense(drive, cdb) == spc.INVALID_FIELD


def test_report_luns_lists_one(drive: CdRom) -> None:
    """REPORT LUNS lists LUN 0 alone, and no well-known ones; too little room is an error."""
    assert data(drive, "a0 00 00 000000 00000100 00 00") == bytes.fromhex("00000008") + bytes(12)
    assert data(drive, "a0 00 01 000000 00000100 00 00") == bytes(8)
    assert sense(drive, "a0 00 00 000000 0000000f 00 00") == spc.INVALID_FIELD
    assert sense(drive, "a0 00 03 000000 00000100 00 00") == spc.INVALID_FIELD


@pytest.mark.parametrize("cdb", NEEDING_A_MEDIUM)
def test_an_empty_drive_is_not_ready(cdb: bytes) -> None:
    """Commands that need a medium report that there is none: 3Ah."""
    assert sense(CdRom(None), cdb) == Sense(spc.SenseKey.NOT_READY, 0x3A, 0x01)


@pytest.mark.parametrize("cdb", NEEDING_A_MEDIUM)
def test_a_loaded_drive_is_ready(drive: CdRom, cdb: bytes) -> None:
    """The same commands succeed with a medium."""
    assert not isinstance(drive.execute(cdb), Check)


def test_capacity(drive: CdRom) -> None:
    """Both commands report the last block and the block size."""
    assert data(drive, READ_CAPACITY) == bytes.fromhex("000003e7 00000800")
    longer = data(drive, "9e 10 0000000000000000 00000020 00 00")
    assert longer == bytes.fromhex("00000000000003e7 00000800") + bytes(20)


def test_capacity_of_an_image_that_ends_within_a_block() -> None:
    """A partial last block counts: its rest reads as zeros."""
    assert CdRom(BLOCK_SIZE + 512).blocks == 2


def test_capacity_too_large_for_ten_bytes() -> None:
    """All ones refer the driver to READ CAPACITY(16)."""
    drive = CdRom((1 << 33) * BLOCK_SIZE)
    assert data(drive, READ_CAPACITY)[:4] == b"\xff" * 4
    longer = data(drive, "9e 10 0000000000000000 0000000c 00 00")
    assert longer == ((1 << 33) - 1).to_bytes(8, "big") + BLOCK_SIZE.to_bytes(4, "big")


def test_another_service_action_is_an_invalid_field(drive: CdRom) -> None:
    """Of SERVICE ACTION IN only READ CAPACITY(16) exists."""
    assert sense(drive, "9e 11 0000000000000000 00000020 00 00") == spc.INVALID_FIELD


@pytest.mark.parametrize(
    ("cdb", "block", "count"),
    [
        ("08 000010 02 00", 16, 2),
        ("08 000010 00 00", 16, 256),
        ("08 e00010 02 00", 16, 2),  # the top bits were once the LUN
        ("28 00 00000010 00 0004 00", 16, 4),
        ("28 00 00000010 00 0000 00", 16, 0),
        ("a8 00 000003e7 00000001 00 00", 999, 1),
        ("88 00 0000000000000000 000003e8 00 00", 0, 1000),
    ],
)
def test_reads_name_an_extent(drive: CdRom, cdb: str, block: int, count: int) -> None:
    """Each READ yields the bytes of its blocks."""
    expected = Extent(block * BLOCK_SIZE, count * BLOCK_SIZE)
    assert drive.execute(bytes.fromhex(cdb)) == expected


@pytest.mark.parametrize(
    "cdb",
    [
        "28 00 000003e8 00 0001 00",
        "28 00 000003e7 00 0002 00",
        "08 0003e8 01 00",
        "a8 00 ffffffff ffffffff 00 00",
        "88 00 ffffffffffffffff ffffffff 00 00",
        "2b 00 000003e8 00000000",
    ],
)
def test_beyond_the_end_is_out_of_range(drive: CdRom, cdb: str) -> None:
    """A range that is not wholly on the medium is refused: 21h."""
    assert sense(drive, cdb) == Sense(spc.SenseKey.ILLEGAL_REQUEST, 0x21)


def test_toc_of_one_track(drive: CdRom) -> None:
    """The TOC has track 1 at block 0, and the lead-out after the last block."""
    toc = data(drive, "43 00 00 000000 00 0324 00")
    assert toc == bytes.fromhex("0012 01 01  00 14 01 00 00000000  00 14 aa 00 000003e8")


def test_toc_in_msf(drive: CdRom) -> None:
    """Minutes, seconds and frames count from the lead-in: block 0 is 00:02:00."""
    toc = data(drive, "43 02 00 000000 01 0324 00")
    assert toc[8:12] == bytes((0, 0, 2, 0))
    assert toc[16:20] == bytes((0, 0, 15, 25))  # 1150 frames


def test_toc_from_the_lead_out(drive: CdRom) -> None:
    """Track AAh is the lead-out alone; there is no track 2."""
    toc = data(drive, "43 00 00 000000 aa 0324 00")
    assert toc == bytes.fromhex("000a 01 01  00 14 aa 00 000003e8")
    assert sense(drive, "43 00 00 000000 02 0324 00") == spc.INVALID_FIELD


@pytest.mark.parametrize("cdb", ["43 00 01 000000 00 000c 00", "43 00 00 000000 00 000c 40"])
def test_session_information(drive: CdRom, cdb: str) -> None:
    """Format 1, in either place, reports that the last session begins with track 1, at block 0."""
    assert data(drive, cdb) == bytes.fromhex("000a 01 01  00 14 01 00 00000000")


def test_raw_toc(drive: CdRom) -> None:
    """Format 2 lists A0, A1, A2 and track 1, in MSF."""
    toc = data(drive, "43 00 02 000000 01 0100 00")
    assert int.from_bytes(toc[:2], "big") == len(toc) - 2
    entries = [toc[at : at + 11] for at in range(4, len(toc), 11)]
    assert [entry[:4] for entry in entries] == [
        bytes((1, 0x14, 0, point)) for point in (0xA0, 0xA1, 0xA2, 1)
    ]
    assert [entry[8:] for entry in entries] == [
        bytes((1, 0, 0)),
        bytes((1, 0, 0)),
        bytes((0, 15, 25)),
        bytes((0, 2, 0)),
    ]


def test_other_toc_formats_are_invalid(drive: CdRom) -> None:
    """PMA, ATIP and CD-TEXT are invalid: a pressed disc has none."""
    assert sense(drive, "43 00 05 000000 00 0100 00") == spc.INVALID_FIELD


def test_msf_ends() -> None:
    """Later blocks of a DVD have the largest MSF."""
    assert mmc.msf(0) == bytes((0, 2, 0))
    assert mmc.msf(10_000_000) == bytes((255, 59, 74))


@pytest.mark.parametrize(
    ("size", "profile"), [(None, 0x00), (700 << 20, 0x08), (4 << 30, 0x10)], ids=str
)
def test_profile_follows_the_size(size: int | None, profile: int) -> None:
    """Up to 80 minutes are a CD, more are a DVD; the profile list marks the current one."""
    answer = data(CdRom(size), "46 00 0000 000000 ffff 00")
    assert int.from_bytes(answer[:4], "big") == len(answer) - 4
    assert int.from_bytes(answer[6:8], "big") == profile
    listed = {answer[at : at + 3] for at in range(12, 20, 4)}
    assert listed == {bytes((0, kind, kind == profile)) for kind in (0x08, 0x10)}


def test_features_from_a_number(drive: CdRom) -> None:
    """RT 0 starts at a feature, RT 2 returns one, RT 3 does not exist."""
    assert data(drive, "46 02 0003 000000 ffff 00")[8:10] == b"\x00\x03"
    assert len(data(drive, "46 02 0003 000000 ffff 00")) == 16
    assert data(drive, "46 00 0010 000000 ffff 00")[8:10] == b"\x00\x10"
    assert len(data(drive, "46 02 0777 000000 ffff 00")) == 8
    assert sense(drive, "46 03 0000 000000 ffff 00") == spc.INVALID_FIELD


def test_current_features_only(drive: CdRom) -> None:
    """RT 1 leaves out features that do not fit the medium: reading a DVD."""
    listed = data(drive, "46 01 001e 000000 ffff 00")[8:]
    assert listed[:2] == b"\x00\x1e"
    assert b"\x00\x1f" not in listed


def test_disc_information(drive: CdRom) -> None:
    """Disc information describes a finished disc with one session and one track."""
    answer = data(drive, "51 00 0000000000 0022 00")
    assert len(answer) == 34
    assert answer[:9] == bytes.fromhex("0020 0e 01 01 01 01 20 00")
    assert sense(drive, "51 01 0000000000 0022 00") == spc.INVALID_FIELD


def test_mode_sense_capabilities(drive: CdRom) -> None:
    """Page 2Ah reports that a tray locks and ejects; it has no block descriptor."""
    answer = data(drive, "5a 00 2a 00 000000 0080 00")
    assert int.from_bytes(answer[:2], "big") == len(answer) - 2
    assert answer[6:8] == b"\0\0"
    assert answer[8:10] == b"\x2a\x12"
    assert len(answer) == 8 + 2 + 0x12
    assert answer[14] == 0x29
    drive.execute(LOCK)
    assert data(drive, "5a 00 2a 00 000000 0080 00")[14] == 0x2B
    short = data(drive, "1a 00 2a 00 80 00")
    assert short[0] == len(short) - 1
    assert short[4:6] == b"\x2a\x12"


def test_mode_sense_all_pages(drive: CdRom) -> None:
    """Page 3Fh is every page in order; no field can be changed."""
    answer = data(drive, "1a 00 3f 00 ff 00")
    assert answer[4:8] == bytes((0x01, 6, 0, 5))
    assert answer[12] == 0x2A
    changeable = data(drive, "1a 00 7f 00 ff 00")
    assert changeable[4:6] == bytes((0x01, 6))
    assert not any(changeable[6:12])
    assert data(drive, "1a 00 3f ff ff 00") == answer


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [
        ("1a 00 08 00 ff 00", spc.INVALID_FIELD),
        ("1a 00 2a 01 ff 00", spc.INVALID_FIELD),
        ("1a 00 ea 00 ff 00", spc.SAVING_NOT_SUPPORTED),
    ],
)
def test_mode_sense_without_such_a_page(drive: CdRom, cdb: str, expected: Sense) -> None:
    """Other pages, subpages and saved values do not exist."""
    assert sense(drive, cdb) == expected


@pytest.mark.parametrize("cdb", ["04 00 00 00 00 00", "15 10 00 00 10 00", "2a 00", "be", "ff", ""])
def test_what_it_does_not_know(drive: CdRom, cdb: str) -> None:
    """Other commands are an invalid operation code; only an empty one is TEST UNIT READY."""
    outcome = drive.execute(bytes.fromhex(cdb))
    assert outcome == (Check(spc.INVALID_OPCODE) if cdb else spc.DONE)


def test_eject_and_load(drive: CdRom) -> None:
    """An open tray has no medium; closed again, the drive reports once that it may have changed."""
    assert drive.execute(EJECT) == spc.DONE
    assert sense(drive, TEST_UNIT_READY) == spc.NO_MEDIUM_TRAY_OPEN
    assert sense(drive, READ_CAPACITY) == spc.NO_MEDIUM_TRAY_OPEN
    assert drive.execute(LOAD) == spc.DONE
    assert sense(drive, TEST_UNIT_READY) == spc.MEDIUM_MAY_HAVE_CHANGED
    assert drive.execute(TEST_UNIT_READY) == spc.DONE


def test_starting_and_stopping_moves_no_tray(drive: CdRom) -> None:
    """Without LoEj, or with a power condition, nothing happens."""
    for cdb in ("1b 00 00 00 00 00", "1b 00 00 00 01 00", "1b 00 00 00 32 00"):
        assert drive.execute(bytes.fromhex(cdb)) == spc.DONE
    assert drive.execute(TEST_UNIT_READY) == spc.DONE


def test_a_locked_tray_stays_closed(drive: CdRom) -> None:
    """PREVENT keeps the tray closed until ALLOW."""
    drive.execute(LOCK)
    assert sense(drive, EJECT) == spc.REMOVAL_PREVENTED
    drive.execute(UNLOCK)
    assert drive.execute(EJECT) == spc.DONE


def test_events_are_polled(drive: CdRom) -> None:
    """Removal and new medium are reported once each, with the state of the tray."""
    assert data(drive, POLL) == bytes.fromhex("0006 04 10 00 02 0000")
    drive.execute(EJECT)
    assert data(drive, POLL) == bytes.fromhex("0006 04 10 03 01 0000")
    assert data(drive, POLL) == bytes.fromhex("0006 04 10 00 01 0000")
    drive.execute(LOAD)
    assert data(drive, POLL) == bytes.fromhex("0006 04 10 02 02 0000")


def test_an_event_that_does_not_fit_stays(drive: CdRom) -> None:
    """The header alone takes no event away."""
    drive.execute(EJECT)
    assert data(drive, "4a 01 0000 10 0000 0004 00") == bytes.fromhex("0006 04 10")
    assert data(drive, POLL)[4] == 3


def test_events_of_other_kinds(drive: CdRom) -> None:
    """Only the media class exists, and only by polling."""
    assert data(drive, "4a 01 0000 02 0000 0008 00") == bytes.fromhex("0002 80 10")
    assert sense(drive, "4a 00 0000 10 0000 0008 00") == spc.INVALID_FIELD


def test_mechanism_status(drive: CdRom) -> None:
    """The answer is eight bytes, with one bit for an open door."""
    command = "bd 00 00000000 0000 0008 00 00"
    assert data(drive, command) == bytes(8)
    drive.execute(EJECT)
    assert data(drive, command) == bytes.fromhex("00 10 000000000000")


def test_request_sense_is_empty(drive: CdRom) -> None:
    """REQUEST SENSE is empty: a failed command returned its sense data itself."""
    drive.execute(b"\xff")
    answer = data(drive, "03 00 00 00 ff 00")
    assert answer == bytes.fromhex("70 00 00 00000000 0a") + bytes(10)
    assert data(drive, "03 00 00 00 08 00") == answer[:8]
    assert sense(drive, "03 01 00 00 ff 00") == spc.INVALID_FIELD


def test_reset_unlocks_and_is_told(drive: CdRom) -> None:
    """After a reset the next command reports it, and the tray opens."""
    drive.execute(LOCK)
    drive.reset()
    assert len(data(drive, "12 00 00 0024 00")) == 36
    assert sense(drive, EJECT) == spc.RESET_OCCURRED
    assert drive.execute(EJECT) == spc.DONE


def test_request_sense_takes_an_attention(drive: CdRom) -> None:
    """REQUEST SENSE reports an attention, which is then not reported again."""
    drive.reset()
    assert data(drive, "03 00 00 00 12 00")[2] == 6
    assert drive.execute(TEST_UNIT_READY) == spc.DONE


def test_sense_data_are_fixed_format() -> None:
    """Sense data have eighteen bytes: key, additional length, code and qualifier."""
    assert spc.REMOVAL_PREVENTED.encode() == bytes.fromhex(
        "70 00 05 00000000 0a 00000000 53 02 00000000"
    )


OPCODES = st.sampled_from([*spc.Opcode]).map(int) | st.integers(0, 255)


@given(
    st.none() | st.integers(1, 1 << 50),
    st.lists(st.tuples(OPCODES, st.binary(max_size=31)), max_size=20),
)
def test_any_bytes_are_answered(size: int | None, commands: list[tuple[int, bytes]]) -> None:
    """No command raises; extents lie on the medium, and data are short."""
    drive = CdRom(size)
    for opcode, rest in commands:
        blocks = drive.blocks
        match drive.execute(bytes((opcode,)) + rest):
            case Extent(offset, length):
                assert 0 <= offset <= offset + length <= blocks * BLOCK_SIZE
            case Data(answer):
                assert len(answer) <= 256
            case Check(reason):
                assert len(reason.encode()) == 18


def test_a_disc_of_more_than_4_gib() -> None:
    """Every command can report and read blocks beyond 4 GiB of bytes, and none after the end."""
    blocks, far = (9 << 30) // BLOCK_SIZE, (5 << 30) // BLOCK_SIZE + 3
    drive = CdRom(blocks * BLOCK_SIZE)
    drive.execute(TEST_UNIT_READY)
    last, size = struct.unpack(">II", data(drive, READ_CAPACITY))
    assert (last + 1, size) == (blocks, BLOCK_SIZE)
    long = data(drive, "9e 10 0000000000000000 00000020 00 00")
    assert struct.unpack_from(">Q", long)[0] + 1 == blocks
    for read in ("28 00 {:08x} 00 0002 00", "a8 00 {:08x} 00000002 00 00"):
        found = drive.execute(bytes.fromhex(read.format(far)))
        assert found == Extent(far * BLOCK_SIZE, 2 * BLOCK_SIZE)
        assert isinstance(drive.execute(bytes.fromhex(read.format(blocks - 1))), Check)
    found = drive.execute(bytes.fromhex(f"88 00 {far:016x} 00000001 00 00"))
    assert found == Extent(far * BLOCK_SIZE, BLOCK_SIZE)
