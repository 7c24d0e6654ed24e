"""Optimisations that make forks of the zygote cheap: rehearsal, gathering, immortals, packing."""
