"""A teacher's label maps for token labelling: `python -m tools.generate_token_labels`."""
