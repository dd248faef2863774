"""Regenerate, strip, embed and migrate: write an adapter in another form of itself.

May import the ground and `adapter`, `base`, `draws`, `files`, `hub` and `publish`.
"""
