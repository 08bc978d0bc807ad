"""Real image => latent.

`descent` inverts by optimization, `perceptual` is its image distance, `store` keeps one result file per image, and
`latents` collects the latents of all images, given or inverted.
"""
