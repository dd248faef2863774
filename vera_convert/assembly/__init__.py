"""Write large files: in threads, from byte ranges that are copied and tensors that are computed.

`direct` writes a file from the beginning to the end, past the system's cache.

May import the ground and `files` and `publish`.
"""
