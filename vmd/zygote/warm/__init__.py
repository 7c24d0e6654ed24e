"""What makes forks of the zygote cheap: rehearsal, gathering, packing."""
