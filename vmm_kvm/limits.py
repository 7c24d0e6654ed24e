"""Limits that several parts share, each with its reason; sizes in bytes."""

from vmm_kvm.bits import MIB

FIRMWARE_MAX = 16 * MIB
"""Of a firmware image, and of the flash memory that keeps its variables: what lies below 4 GiB."""
