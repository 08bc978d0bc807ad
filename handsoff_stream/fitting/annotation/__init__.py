"""Labels drawn on generated images instead of real ones: which samples to annotate, and where they are written."""
