"""Disk images: files that hold a virtual disk's contents."""
