"""Files on disk: atomic writing, tensors with a manifest, and the strict reader of untrusted files.

Does not know networks. This package reads a published file into inert content; `generators.published`,
`fitting.encoder` and `fitting.published` interpret that content.
"""
