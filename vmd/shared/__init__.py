"""Code that several processes of the daemon use."""
