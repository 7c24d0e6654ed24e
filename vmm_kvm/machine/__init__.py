"""A whole machine: its specification, its wiring, the threads that run it."""
