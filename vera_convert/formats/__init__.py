"""Turn results into text for people and into documents for programs: pure functions.

May import the ground and `adapter`, `base`, `conversion`, `draws`, `lora`,
`merging`, `validation` and `verification`.
"""
