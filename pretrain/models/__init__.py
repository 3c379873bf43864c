"""Models as ordered lists of layers, wired by name. Nothing here knows how many processes run it."""
