"""How the checkpoint `faces` was made: images, generator, inversion and labels."""
