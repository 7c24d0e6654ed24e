"""vhost-user: a virtio device whose queues another process serves, on shared guest memory.

`messages` and `channel` are the protocol, `regions` the guest memory that a server maps, `server`
the side that has the device, `client` the requests of the side that has the guest, and `frontend`
the device that its PCI transport sees.

Source: QEMU docs/interop/vhost-user.
"""
