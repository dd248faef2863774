"""Verify a conversion: compare each tensor with the formula, the inputs and our own layer.

May import the ground and `adapter`, `assembly`, `base`, `conversion`, `draws`, `files`, `hub`,
`lora`, `merging`, `publish` and `targets`.
"""
