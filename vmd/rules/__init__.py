"""The daemon's decisions: pure modules, which are given the time and reports."""
