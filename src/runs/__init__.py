"""What a run leaves behind: its record, its results, its curve, and how they are read back."""
