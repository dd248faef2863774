"""The version, for the package, the wheel and the metadata."""

__version__ = "0.1.0"
