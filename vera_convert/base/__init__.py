"""Read a base model from its headers, and match the base's tensors with an adapter's layers.

`resolve` finds the base of an adapter, and `facts` holds the result. Two modules decide which
tensor of the base belongs to which module of the adapter: `match` for the adapted layers, and
`replacements` for the modules trained whole by PEFT. The two modules follow `strategies` and
`renames`.

May import the ground and `adapter`, `draws`, `files`, `hub` and `targets`.
"""
