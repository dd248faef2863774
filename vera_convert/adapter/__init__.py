"""Read a VeRA adapter from its folder: config, tensors, fingerprint, and the known old forms.

May import the ground and `draws` and `files`.
"""
