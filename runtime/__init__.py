"""The room behind `utils`: what lets a run on one or many processes survive, and what it leaves on disk."""
