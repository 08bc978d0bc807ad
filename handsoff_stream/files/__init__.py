"""Bytes on disk: writing whole files, tensors with a manifest, and the strict reader of foreign files.

Knows no network. A published file is read here into inert content; `generators.published`, `fitting.encoder` and
`fitting.published` give that content a meaning.
"""
