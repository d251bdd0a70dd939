"""A run's directory: its names, its log, its checkpoints, and those who read them. Nothing else knows its files."""
