"""The command line: the table of verbs, what reads it, and what prints help from it."""
