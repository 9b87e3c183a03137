"""Floor 2: how a network trains."""
