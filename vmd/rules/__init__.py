"""What the daemon decides, without doing it: pure modules, which are handed time and reports."""
