"""The room behind `infer.py`: a model from a checkpoint, what it predicts, how well, and why."""
