"""What comes from outside, read with care: bytes, JSON, safetensors headers and tensors."""
