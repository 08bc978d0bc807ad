"""Plain re-implementations of the published methods, which the measurements compare with."""
