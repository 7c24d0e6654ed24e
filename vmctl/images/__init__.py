"""Disk images: made, looked at, pulled from distributions, and the seeds of cloud-init."""
