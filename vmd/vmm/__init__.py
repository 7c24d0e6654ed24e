"""The vmm process: has processes made and reaps them; no privileges."""
