"""The classifier part of `infer.py`: evaluation, prediction, explanations and output files."""
