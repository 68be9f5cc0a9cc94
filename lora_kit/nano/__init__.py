"""The embedded base model and its text; only imports the standard library."""

from pathlib import Path

from .text import docstrings, general, held_out, instructions, topics

MODEL = Path(__file__).parent / "model"

__all__ = ["MODEL", "docstrings", "general", "held_out", "instructions", "topics"]
