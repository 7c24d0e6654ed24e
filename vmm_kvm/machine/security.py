"""What protects a machine: flash memory for UEFI variables, a TPM, encrypted memory."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmm_kvm.arch.x86.image import FirmwareImage
from vmm_kvm.arch.x86.layout import TPM_ADDRESS, TPM_SIZE
from vmm_kvm.bus import Bus

if TYPE_CHECKING:  # loaded for the machines that have one
    from vmm_kvm.devices.pflash import Pflash
    from vmm_kvm.devices.rom import Rom
    from vmm_kvm.devices.tpm_crb import Executor
    from vmm_kvm.kvm.sev import Launch, Measurement
    from vmm_kvm.kvm.system import Kvm
    from vmm_kvm.kvm.vcpu import Vcpu
    from vmm_kvm.machine.spec import MachineSpec
    from vmm_kvm.memory import GuestMemory


def make_flash(
    spec: "MachineSpec", mmio: Bus, set_mapped: Callable[[bool], None], stack: ExitStack
) -> "Pflash | None":
    """Put the variables right below the firmware: memory to read, a device to write.

    `set_mapped` makes them memory, or a device alone; `stack` closes the device. None without.
    """
    image, variables = spec.image, spec.variables
    if not isinstance(image, FirmwareImage) or variables is None:
        return None
    from vmm_kvm.devices.pflash import Pflash  # noqa: PLC0415 - for UEFI guests only

    flash = Pflash(memoryview(variables.array), set_mapped=set_mapped, store=variables.store)
    stack.callback(flash.close)
    mmio.insert(image.rom_base - variables.size, variables.size, flash)
    return flash


def make_tpm(tpm: "Executor | None", mmio: Bus, stack: ExitStack) -> None:
    """Switch a TPM on, and show it to the guest; `stack` closes the interface, not the TPM.

    Raises:
        VmmError: it does not work.
    """
    if tpm is None:
        return
    from vmm_kvm.devices.tpm_crb import TpmCrb  # noqa: PLC0415 - few guests have one

    interface = TpmCrb(TPM_ADDRESS, tpm)
    stack.callback(interface.close)
    mmio.insert(TPM_ADDRESS, TPM_SIZE, interface)


def make_launch(spec: "MachineSpec", kvm: "Kvm", is_restored: bool) -> "Launch | None":
    """Return the launch of a machine with encrypted memory; None for any other.

    Raises:
        SpecError: the machine has something that does not go together with that.
        KvmError: the processor has no SEV.
    """
    if spec.sev is None:
        return None
    from vmm_kvm.machine.encryption import plan_launch  # noqa: PLC0415 - few guests have it

    return plan_launch(spec, spec.sev, kvm, is_restored=is_restored)


def encrypt_memory(
    launch: "Launch | None",
    spec: "MachineSpec",
    memory: "GuestMemory",
    rom: "Rom | None",
    vcpu: Callable[[int], "Vcpu"],
) -> "Measurement | None":
    """Carry out a launch, if there is one; the first vCPU has its first registers.

    Raises:
        KvmError: KVM or the firmware refused.
    """
    if launch is None:
        return None
    from vmm_kvm.machine.encryption import encrypt  # noqa: PLC0415 - likewise

    return encrypt(launch, spec, memory, rom, vcpu)
