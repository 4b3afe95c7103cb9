"""Studies: every cell of a table trained on equal terms, and what came out."""
