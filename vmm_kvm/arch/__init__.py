"""Processors, and the machines that are built around them: one folder each."""
