"""Streaming image-text data: manifests, a computed order, decoding, masking and batches.

Importing this package imports neither torch nor OpenCV, so that the command line answers at once.
"""
