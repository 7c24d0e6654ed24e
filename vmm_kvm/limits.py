"""Limits that several parts share, each with its reason; sizes in bytes."""

from vmm_kvm.bits import GIB, MIB

FIRMWARE_MAX = 16 * MIB
"""Of a firmware image, and of the flash memory that keeps its variables: what lies below 4 GiB."""

NAME_MAX = 63
"""Of the name of a VM or switch; OpenBSD's 64 include a NUL."""
VCPUS_MAX = 64
"""Of a VM. Source: OpenBSD vmm(4), VMM_MAX_VCPUS_PER_VM."""
TABLE_VCPUS_MAX = 512
"""Of all VMs of a table. Source: OpenBSD vmm(4), VMM_MAX_VCPUS."""
MEMORY_MIN = MIB
MEMORY_MAX = 128 * GIB
"""Of a VM, and where its last range ends. Source: OpenBSD vmm(4), VMM_MAX_VM_MEM_SIZE."""

INTERFACE_NAME_MAX = 15
"""Of a network interface of the host. Source: Linux, IFNAMSIZ, which counts a NUL."""
MTU_MIN = 68
"""The least that IPv4 works with. Source: RFC 791."""
MTU_DEFAULT = 1500
MTU_MAX = 65521
"""The largest that a tap takes: 65535 with an Ethernet header. Source: Linux drivers/net/tun.c."""
QUEUE_PAIRS_MAX = 16
"""Of a network interface."""
PORT_MAX = 65535
"""Of TCP and UDP."""

DISKS_MAX = 4
"""Of a VM of the daemon. Source: OpenBSD vmd(8), VM_MAX_DISKS_PER_VM."""
INTERFACES_MAX = 4
"""Of a VM of the daemon. Source: OpenBSD vmd(8), VM_MAX_NICS_PER_VM."""
SHARES_MAX = 8
"""Shared directories of a VM of the daemon."""
SHARE_TAG_MAX = 36
"""Bytes of the tag of a shared directory. Source: virtio 1.3 §5.11.4."""
DISK_QUEUES_MAX = 64
DISK_SERIAL_MAX = 20
"""Of the identity of a disk. Source: virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID."""

CID_MIN, CID_MAX = 3, (1 << 32) - 2
"""Addresses that a guest can have by a vsock device. Source: virtio 1.3 §5.10.4."""
GUEST_PORT_MAX = (1 << 32) - 2
"""Of vsock; the one above it stands for any. Source: vsock(7), VMADDR_PORT_ANY."""
