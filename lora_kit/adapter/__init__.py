"""Attach, load and check adapters."""
