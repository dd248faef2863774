"""Output that appears whole or not at all. Nothing else in the package renames or deletes."""
