"""The interface of AMD's Secure Encrypted Virtualization: KVM's part, and that of /dev/sev.

A table in the order of <asm/kvm.h>, <linux/kvm.h> and <linux/psp-sev.h>, which a test compares with
the installed headers, as `abi`. KVM_SEV_INIT2 and the types of VMs are newer than Linux 6.1. Left
out: migration, secrets, SEV-SNP.
"""

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

from vmm_kvm.kvm.abi import KVMIO
from vmm_kvm.kvm.ioctl import _IOR, _IOWR, OPERATIONS

# Types of VMs: the argument of KVM_CREATE_VM, a bit each of KVM_CAP_VM_TYPES
KVM_X86_DEFAULT_VM = 0
KVM_X86_SEV_VM = 2
KVM_X86_SEV_ES_VM = 3
KVM_CAP_VM_TYPES = 235

# enum sev_cmd_id
KVM_SEV_INIT = 0
KVM_SEV_ES_INIT = 1
KVM_SEV_LAUNCH_START = 2
KVM_SEV_LAUNCH_UPDATE_DATA = 3
KVM_SEV_LAUNCH_UPDATE_VMSA = 4
KVM_SEV_LAUNCH_MEASURE = 6
KVM_SEV_LAUNCH_FINISH = 7
KVM_SEV_GUEST_STATUS = 16
KVM_SEV_INIT2 = 22

COMMANDS = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_SEV_") and isinstance(value, int)
}
"""The C name of each command, for error messages."""


class kvm_sev_cmd(Structure):
    _fields_ = (
        ("id", c_uint32),
        ("pad0", c_uint32),
        ("data", c_uint64),
        ("error", c_uint32),
        ("sev_fd", c_uint32),
    )


class kvm_sev_init(Structure):
    _fields_ = (
        ("vmsa_features", c_uint64),
        ("flags", c_uint32),
        ("ghcb_version", c_uint16),
        ("pad1", c_uint16),
        ("pad2", c_uint32 * 8),
    )


class kvm_sev_launch_start(Structure):
    _fields_ = (
        ("handle", c_uint32),
        ("policy", c_uint32),
        ("dh_uaddr", c_uint64),
        ("dh_len", c_uint32),
        ("pad0", c_uint32),
        ("session_uaddr", c_uint64),
        ("session_len", c_uint32),
        ("pad1", c_uint32),
    )


class kvm_sev_launch_update_data(Structure):
    _fields_ = (("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32))


class kvm_sev_launch_measure(Structure):
    _fields_ = (("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32))


class kvm_sev_guest_status(Structure):
    _fields_ = (("handle", c_uint32), ("policy", c_uint32), ("state", c_uint32))


class kvm_enc_region(Structure):
    _fields_ = (("addr", c_uint64), ("size", c_uint64))


KVM_MEMORY_ENCRYPT_OP = _IOWR(KVMIO, 0xBA, c_uint64)
KVM_MEMORY_ENCRYPT_REG_REGION = _IOR(KVMIO, 0xBB, kvm_enc_region)
OPERATIONS[KVM_MEMORY_ENCRYPT_OP] = "KVM_MEMORY_ENCRYPT_OP"
OPERATIONS[KVM_MEMORY_ENCRYPT_REG_REGION] = "KVM_MEMORY_ENCRYPT_REG_REGION"

# <linux/psp-sev.h>

SEV_PLATFORM_STATUS = 1

# sev_ret_code
SEV_RET_INVALID_PLATFORM_STATE = 1
SEV_RET_INVALID_GUEST_STATE = 2
SEV_RET_INVALID_LEN = 4
SEV_RET_POLICY_FAILURE = 7
SEV_RET_INACTIVE = 8
SEV_RET_INVALID_ADDRESS = 9
SEV_RET_INVALID_ASID = 13
SEV_RET_WBINVD_REQUIRED = 14
SEV_RET_DFFLUSH_REQUIRED = 15
SEV_RET_INVALID_GUEST = 16
SEV_RET_INVALID_COMMAND = 17
SEV_RET_ACTIVE = 18
SEV_RET_HWSEV_RET_PLATFORM = 19
SEV_RET_HWSEV_RET_UNSAFE = 20
SEV_RET_UNSUPPORTED = 21
SEV_RET_INVALID_PARAM = 22
SEV_RET_RESOURCE_LIMIT = 23
SEV_RET_SECURE_DATA_INVALID = 24

FAILURES = {
    value: name.removeprefix("SEV_RET_").lower().replace("_", " ")
    for name, value in list(globals().items())
    if name.startswith("SEV_RET_")
}
"""The firmware's reasons, for error messages."""

SEV_STATUS_FLAGS_CONFIG_ES = 0x0100


class sev_user_data_status(Structure):
    _pack_ = 1
    _layout_ = "ms"  # said since Python 3.14, and what _pack_ means
    _fields_ = (
        ("api_major", c_uint8),
        ("api_minor", c_uint8),
        ("state", c_uint8),
        ("flags", c_uint32),
        ("build", c_uint8),
        ("guest_count", c_uint32),
    )


class sev_issue_cmd(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("cmd", c_uint32), ("data", c_uint64), ("error", c_uint32))


SEV_ISSUE_CMD = _IOWR(ord("S"), 0x0, sev_issue_cmd)
OPERATIONS[SEV_ISSUE_CMD] = "SEV_ISSUE_CMD"
