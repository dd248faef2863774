"""Find and read an adapter or a base: a folder here, or a repo on the Hub at one commit.

May import the ground and `files`.
"""
