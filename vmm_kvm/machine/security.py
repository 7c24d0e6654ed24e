"""What a machine has beside its firmware: flash memory for variables, and a TPM."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmm_kvm.arch.x86.image import FirmwareImage
from vmm_kvm.arch.x86.layout import TPM_ADDRESS, TPM_SIZE
from vmm_kvm.bus import Bus

if TYPE_CHECKING:  # loaded for the machines that have one
    from vmm_kvm.devices.pflash import Pflash
    from vmm_kvm.devices.tpm_crb import Executor
    from vmm_kvm.machine.spec import MachineSpec


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
