"""Optimisations that make forks of the zygote cheap: rehearsal, gathering, immortal objects, packing."""
