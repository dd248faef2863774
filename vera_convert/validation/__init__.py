"""validate: every way in which an adapter is wrong, at once, for people and for CI."""
