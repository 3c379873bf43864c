"""One sample to arrays: pixels, pieces, masks."""
