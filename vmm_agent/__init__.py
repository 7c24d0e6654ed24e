"""The guest agent: one file that is copied into guests, and its systemd unit."""
