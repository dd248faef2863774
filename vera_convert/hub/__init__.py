"""Where an adapter or a base lies: a folder here, or a repo on the Hub at one commit."""
