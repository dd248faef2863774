"""Quantized bases: which layers are packed, in which format, and the weights they stand for."""
