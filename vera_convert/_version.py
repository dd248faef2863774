"""The version, said once: the package, its wheel and its metadata read it here."""

__version__ = "0.1.0"
