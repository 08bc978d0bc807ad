"""Labelled image sources; they know nothing of generators, label generators or streams."""
