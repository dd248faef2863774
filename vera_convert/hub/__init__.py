"""Find an adapter or a base: a folder on this machine, or a repo on the Hub at one commit.

May import the ground and `files`.
"""
