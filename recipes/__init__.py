"""How the checkpoints that ship were made."""
