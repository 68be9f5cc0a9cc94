"""A model in, loaded and pinned."""
