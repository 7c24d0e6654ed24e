"""The control process: clients; no privileges."""
