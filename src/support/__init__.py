"""What knows nobody: files, locks, signals, errors, the console."""
