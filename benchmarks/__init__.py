"""Measurements of handsoff_stream. Run one from the root of the repository: `python -m benchmarks.throughput`.

`reference` holds plain re-implementations of what is compared with, `report` turns results into tables and plots.
"""
