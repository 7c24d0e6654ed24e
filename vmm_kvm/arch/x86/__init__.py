"""The PC and its processor: CPUID, registers, layout, firmware tables, boot protocols."""
