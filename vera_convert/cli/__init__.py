"""The command line: parse the options, call the library's function, print the result, exit.

May import `base`, `conversion`, `formats`, `hub`, `lora`, `merging`, `publish`, `validation` and
`verification`; a command imports its function when it runs, so that `--help` loads click alone.
"""
