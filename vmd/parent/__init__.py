"""The parent, as root: configuration, lifecycle, every file that is opened, the other processes."""
