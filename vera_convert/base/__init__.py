"""Read a base model from its headers, and match the base's tensors with an adapter's layers.

May import the ground and `adapter`, `draws`, `files`, `hub` and `targets`.
"""
