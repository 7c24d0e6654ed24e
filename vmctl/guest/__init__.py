"""Into the guest: its agent, and the commands that go through it."""
