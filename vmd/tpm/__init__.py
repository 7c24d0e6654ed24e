"""The tpm process: executes a swtpm for each VM that has a TPM; no files of VMs."""
