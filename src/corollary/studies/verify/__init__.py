"""Studies of what networks provably do."""
