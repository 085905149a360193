"""The object store, and the name of every object in it."""
