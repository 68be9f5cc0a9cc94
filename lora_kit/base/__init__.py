"""The base model: pinned and loaded."""
