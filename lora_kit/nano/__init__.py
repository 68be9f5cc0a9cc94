"""The embedded base model and the text it is tried on; the standard library alone is imported."""

from pathlib import Path

from .text import docstrings, general, held_out, instructions, topics

MODEL = Path(__file__).parent / "model"

__all__ = ["MODEL", "docstrings", "general", "held_out", "instructions", "topics"]
