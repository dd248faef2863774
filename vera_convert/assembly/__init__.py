"""Write large files in threads, from byte ranges that are copied and tensors that are computed.

May import the ground and `files` and `publish`.
"""
