"""The daemon: OpenBSD's vmd(8) on Linux."""
