"""Read bytes, JSON, safetensors headers and tensors that a stranger wrote, within bounds.

May import the ground alone.
"""
