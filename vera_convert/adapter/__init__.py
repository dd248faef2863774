"""A VeRA adapter: its config, its tensors, its folder, its known damages."""
