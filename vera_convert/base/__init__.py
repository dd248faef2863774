"""A base model as its headers describe it, and how its tensors answer to an adapter's layers."""
