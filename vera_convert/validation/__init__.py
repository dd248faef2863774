"""Validate adapters: find every fault at once, each with its code.

May import the ground and `adapter`, `base`, `conversion`, `draws`, `files`, `hub` and `targets`.
"""
