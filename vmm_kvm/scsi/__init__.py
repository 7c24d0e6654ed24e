"""SCSI targets: from a command descriptor block to what the device answers, in bytes."""
