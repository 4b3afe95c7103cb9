"""The picture of both architectures in the README: `python -m tools.draw_architectures`."""
