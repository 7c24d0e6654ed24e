"""The opener: a process that has become a client, and opens that client's files for one start."""
