"""A machine that has left its process: as a file, or as a stream through a pipe."""
