"""The command line: parse the options, call the library's function, print the result, exit.

May import `base`, `conversion`, `files`, `formats`, `hub`, `lora`, `merging`, `publish`,
`validation` and `verification`. A command imports the library's function when the command runs:
`--help` loads click alone.
"""
