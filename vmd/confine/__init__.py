"""What each process gives up: users, capabilities, namespaces, files, system calls."""
