"""merge: base weights plus the deltas of adapters, a complete model, without PyTorch."""
