"""Shelf 3: ways out of a stream besides training on it, one per file. They know streams and batches, nothing before."""
