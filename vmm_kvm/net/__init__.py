"""Networks, as a VM's devices see them: Ethernet frames, taps, what an interface is made of."""
