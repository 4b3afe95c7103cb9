"""What `engine.py` consists of: flags, building and resuming a run, its output, losses and tasks."""
