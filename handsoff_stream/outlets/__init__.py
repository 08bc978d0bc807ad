"""Exporters and adapters for training loops, one per file. They know streams and batches, and nothing upstream."""
