"""Write output that appears whole or not at all; no other folder renames or deletes.

May import the ground and `files`.
"""
