"""/dev/kvm: the only code that talks to it."""
