"""A run's processes, checkpoints and directory, and how a script ends."""
