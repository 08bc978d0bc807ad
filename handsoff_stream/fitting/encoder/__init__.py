"""An encoder's guess of the latent, from which inversion starts.

`restyle` runs ReStyle encoders, `backbones` are their networks, `files` reads the published ones, and `train` trains
one for a domain that has none.
"""
