"""PCI: configuration space, the host bridge, and the parts of a function."""
