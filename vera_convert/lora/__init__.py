"""Write a VeRA adapter as the LoRA adapter with the same delta, in the form that an engine loads.

May import the ground and `adapter`, `assembly`, `base`, `conversion`, `draws`, `files`, `hub`,
`merging`, `publish` and `targets`.
"""
