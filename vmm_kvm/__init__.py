"""The hypervisor library: vmm(4) on KVM.

Layers, lowest first: `kvm` talks to /dev/kvm; `memory`, `bus`, `irq`, `clock` are the vocabulary
that devices are written in; `devices`, `pci` and `boot` know nothing of KVM; `machine` wires them
together, `runner` runs the vCPUs, and `primitives` offers vmm(4)'s operations as functions.
"""
