"""From the committed results to the tables of README.md and results/README.md, and to a plot beside each result."""
