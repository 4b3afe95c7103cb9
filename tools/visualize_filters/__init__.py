"""What spectral and scattering layers have learned, drawn: `python -m tools.visualize_filters`."""
