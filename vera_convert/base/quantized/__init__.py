"""Quantized bases: the packed layers, their formats, and the weights of the unpacked model."""
