"""Boot images: from bytes to guest memory and the state of the first vCPU."""
