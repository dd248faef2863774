"""Turn results into text for people and into documents for programs: pure functions.

May import the ground and `base`, `conversion`, `files`, `lora`, `merging`, `targets`, `validation`
and `verification`.
"""
