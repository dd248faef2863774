"""Which layers of a model PEFT adapts, told without the model."""
