"""What several processes of the daemon use."""
