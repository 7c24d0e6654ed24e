"""Confinement of each process: users, capabilities, namespaces, files, system calls."""
