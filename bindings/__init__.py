"""Everything that knows somebody else's objects."""
