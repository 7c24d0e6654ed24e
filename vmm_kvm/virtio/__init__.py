"""virtio: queues, the PCI transport, device types, and the dataplanes that serve queues."""
