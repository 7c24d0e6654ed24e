"""The priv process: the host's network; CAP_NET_ADMIN."""
