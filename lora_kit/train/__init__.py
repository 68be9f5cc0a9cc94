"""The trainer, its arguments, its checkpoints and the run directory."""
