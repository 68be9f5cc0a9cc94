"""Arithmetic and settings that make a step quick."""
