"""Models as ordered lists of layers, each `forward(flow) -> flow`. Nothing here knows how many processes run it."""
