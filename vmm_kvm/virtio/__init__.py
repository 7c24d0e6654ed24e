"""virtio: queues, the PCI transport, device types, and who serves a device's queues."""
