"""Turn results into text for people and into documents for programs: pure functions.

May import the ground and `base`, `conversion`, `draws`, `files`, `lora`,
`merging`, `validation` and `verification`.
"""
