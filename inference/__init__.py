"""The parts of `infer.py` for classifiers: evaluation, prediction, explanations, files."""
