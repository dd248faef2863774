"""Find the layers of a model PEFT adapts, without the model itself.

May import the ground, `adapter` and `files`.
"""
