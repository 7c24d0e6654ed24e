"""PCI: configuration space, the host bridge, and what a function is made of."""
