"""Merge adapters into a base, shard by shard in bounded memory, without PyTorch.

May import the ground and `adapter`, `assembly`, `base`, `conversion`, `draws`, `files`, `hub` and
`publish`.
"""
