"""Networks, as a VM's devices see them: Ethernet frames, taps, the parts of an interface."""
