"""The TPM's interface, by the accesses of Linux's driver, with TPMs that answer as they like."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_kvm.devices.tpm_crb import BUFFER, BUFFER_SIZE, Register, Status, TpmCrb
from vmm_kvm.swtpm import SwtpmError

BASE = 0xFED4_0000
COMMAND = bytes.fromhex("80010000000c0000017b0010")
RESPONSE = bytes.fromhex("80010000000c000000000002abcd")
DEADLINE_S = 30.0


class Tpm:
    """A TPM with one answer, which it can keep back; an `Executor`."""

    def __init__(self, response: bytes = RESPONSE, error: str | None = None) -> None:
        self.response, self.error = response, error
        self.commands: list[bytes] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.times_on = self.cancelled = self.abandoned = 0

    def power_on(self) -> None:
        """Count it."""
        self.times_on += 1

    def execute(self, command: bytes) -> bytes:
        """Answer, once it may."""
        self.commands.append(command)
        assert self.may_answer.wait(DEADLINE_S)
        if self.error:
            raise SwtpmError(self.error)
        return self.response

    def cancel(self) -> None:
        """Answer now."""
        self.cancelled += 1
        self.may_answer.set()

    def abandon(self) -> None:
        """Fail now."""
        self.abandoned += 1
        self.error = "abandoned"
        self.may_answer.set()


class Driver:
    """A driver's accesses to the interface."""

    def __init__(self, tpm: Tpm) -> None:
        self.tpm = tpm
        self.device = TpmCrb(BASE, tpm)

    def read(self, offset: int, size: int = 4) -> int:
        """Read a register."""
        with self.device.lock:
            return self.device.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        with self.device.lock:
            self.device.write(offset, size, value)

    def put(self, data: bytes) -> None:
        """Write the buffer, byte for byte."""
        for at, byte in enumerate(data):
            self.write(BUFFER + at, byte, 1)

    def get(self, size: int) -> bytes:
        """Read the buffer."""
        return bytes(self.read(BUFFER + at, 1) for at in range(size))

    def begin(self) -> None:
        """Take the locality, and make the TPM ready."""
        self.write(Register.LOC_CTRL, 1)
        self.write(Register.CTRL_REQ, 1)

    def start(self) -> None:
        """Start the command in the buffer."""
        self.write(Register.CTRL_START, 1)

    def wait(self) -> None:
        """Wait until it is done."""
        for thread in threading.enumerate():
            if thread.name == "tpm":
                thread.join(DEADLINE_S)
        assert not self.read(Register.CTRL_START)


def test_what_it_is() -> None:
    """CRB, one locality, a buffer behind the registers; its TPM has been switched on."""
    driver = Driver(Tpm())
    assert driver.tpm.times_on == 1
    assert driver.read(Register.LOC_STATE) == 0x81
    interface = driver.read(Register.INTF_ID, 8)
    assert interface & 0xF == 1
    assert interface >> 17 & 3 == 1
    assert driver.read(Register.CTRL_CMD_LADDR) == BASE + BUFFER
    assert driver.read(Register.CTRL_RSP_ADDR, 8) == BASE + BUFFER
    for size in (Register.CTRL_CMD_SIZE, Register.CTRL_RSP_SIZE):
        assert driver.read(size) == BUFFER_SIZE
    assert driver.read(Register.CTRL_STS) == Status.IDLE
    assert driver.read(0x1000) == 0xFFFF_FFFF  # another locality


def test_a_command() -> None:
    """It goes to the TPM as it is, and the response lies where the command was."""
    driver = Driver(Tpm())
    driver.begin()
    assert driver.read(Register.LOC_STATE) == 0x83
    assert driver.read(Register.LOC_STS) == 1
    assert driver.read(Register.CTRL_STS) == 0
    driver.put(COMMAND + b"beyond")
    driver.start()
    driver.wait()
    assert driver.tpm.commands == [COMMAND]
    assert driver.get(len(RESPONSE)) == RESPONSE
    driver.write(Register.CTRL_REQ, 2)
    assert driver.read(Register.CTRL_STS) == Status.IDLE
    driver.write(Register.LOC_CTRL, 2)
    assert driver.read(Register.LOC_STATE) == 0x81


def test_while_a_command_runs() -> None:
    """The buffer cannot be written, no second one begins, and it can be cancelled."""
    driver = Driver(Tpm())
    driver.tpm.may_answer.clear()
    driver.begin()
    driver.put(COMMAND)
    driver.start()
    driver.put(bytes(12))
    driver.start()
    assert driver.get(12) == COMMAND
    assert driver.read(Register.CTRL_START) == 1
    driver.write(Register.CTRL_CANCEL, 1)
    driver.wait()
    assert (driver.tpm.cancelled, driver.tpm.commands) == (1, [COMMAND])
    driver.write(Register.CTRL_CANCEL, 1)  # nothing runs
    assert driver.tpm.cancelled == 1


@pytest.mark.parametrize("size", [0, 9, BUFFER_SIZE + 1, 0xFFFF_FFFF])
def test_a_command_of_no_size(size: int) -> None:
    """It fails; the TPM does not see it, and the next one is as good as any."""
    driver = Driver(Tpm())
    driver.begin()
    driver.put(b"\x80\x01" + size.to_bytes(4, "big"))
    driver.start()
    assert driver.read(Register.CTRL_STS) & Status.FAILED
    assert driver.tpm.commands == []
    driver.put(COMMAND)
    driver.start()
    driver.wait()
    assert driver.read(Register.CTRL_STS) == 0


@pytest.mark.parametrize(
    "tpm", [Tpm(b""), Tpm(bytes(9)), Tpm(bytes(BUFFER_SIZE + 1)), Tpm(error="gone")]
)
def test_a_tpm_that_fails(tpm: Tpm) -> None:
    """No answer, or none that fits: the command has failed, and the buffer is as it was."""
    driver = Driver(tpm)
    driver.begin()
    driver.put(COMMAND)
    driver.start()
    driver.wait()
    assert driver.read(Register.CTRL_STS) & Status.FAILED
    assert driver.get(12) == COMMAND


def test_nothing_starts_without_the_locality() -> None:
    """As on a chip."""
    driver = Driver(Tpm())
    driver.put(COMMAND)
    driver.start()
    assert driver.read(Register.CTRL_START) == 0
    assert driver.tpm.commands == []


def test_closing_ends_a_command() -> None:
    """And none begins afterwards."""
    driver = Driver(Tpm())
    driver.tpm.may_answer.clear()
    driver.begin()
    driver.put(COMMAND)
    driver.start()
    driver.device.close()
    driver.device.close()
    assert driver.tpm.cancelled == 1
    driver.start()
    assert len(driver.tpm.commands) == 1


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(list(map(int, Register))), st.integers(0, 0x5000)),
            st.sampled_from([1, 2, 4, 8]),
            st.integers(0, 1 << 64),
        ),
        max_size=40,
    )
)
def test_any_accesses(writes: list[tuple[int, int, int]]) -> None:
    """No access fails, and read-only registers keep their values."""
    driver = Driver(Tpm())
    for offset, size, value in writes:
        driver.write(offset, value, size)
        assert 0 <= driver.read(offset, size) < 1 << 8 * size
    driver.wait()
    assert driver.read(Register.CTRL_CMD_SIZE) == BUFFER_SIZE
    driver.device.close()
