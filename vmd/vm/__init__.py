"""The process of one VM: vCPU threads, one event loop, the console."""
