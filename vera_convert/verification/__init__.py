"""verify: what a conversion made, held against the formula, the inputs and the layer itself."""
