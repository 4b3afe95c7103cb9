"""The room behind `engine.py`: options, building a run, resuming, what is told, losses and tasks."""
