"""What the daemon's processes and its clients say to each other, and how it becomes packets."""
