"""Disk images as files: opening one with its chain of bases, making a new one."""
