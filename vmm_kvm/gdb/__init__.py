"""A debugger's view of a machine: GDB's remote protocol, served for one machine."""
