"""The trainer, its arguments, checkpoints and the run directory."""
