"""The vmm process: orders processes from the zygote and reaps them; no privileges."""
