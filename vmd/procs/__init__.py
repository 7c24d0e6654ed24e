"""The processes of the daemon, and those that can be started by themselves: a module each."""
