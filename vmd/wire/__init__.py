"""Messages between the daemon's processes and its clients, and their encoding as packets."""
