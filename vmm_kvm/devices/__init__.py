"""Chips of the machine: each knows offsets, values, an IRQ line and a clock, and nothing of KVM."""
