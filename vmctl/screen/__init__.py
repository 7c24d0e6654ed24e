"""What a person sees: terminals, consoles, tables and progress."""
