"""A FUSE server: a directory of the host, as requests of the FUSE protocol see it."""
