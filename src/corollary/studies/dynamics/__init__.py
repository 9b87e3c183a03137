"""The studies of the room `dynamics`."""
