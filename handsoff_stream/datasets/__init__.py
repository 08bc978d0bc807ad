"""Datasets of labelled images. They do not know generators, label generators or streams."""
