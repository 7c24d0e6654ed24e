"""The command: OpenBSD's vmctl(8) on Linux."""
