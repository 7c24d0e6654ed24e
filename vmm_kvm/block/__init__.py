"""Disk images: what a virtual disk's contents are kept in."""
