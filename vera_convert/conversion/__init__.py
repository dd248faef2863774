"""regenerate, strip, embed and migrate: an adapter becomes another form of itself."""
