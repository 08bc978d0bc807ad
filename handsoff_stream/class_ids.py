"""What all masks and label maps agree on: the id of unlabelled pixels, and how a display color is written.

Knows numbers. Does not know which classes there are, or where masks come from.
"""

IGNORE_INDEX = 255
"""Class id of unlabelled pixels: they do not count in a loss or a metric, and are never predicted."""
Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
