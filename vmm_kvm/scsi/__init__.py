"""SCSI targets: from a command descriptor block to the device's answer, in bytes."""
