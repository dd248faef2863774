"""Read strangers' files within bounds: bytes, JSON, safetensors headers, tensors and folders.

May import the ground alone.
"""
