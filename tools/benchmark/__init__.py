"""Models, layers and the input pipeline measured side by side: `python -m tools.benchmark`."""
