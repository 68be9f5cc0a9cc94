"""What leaves the toolkit: merged models."""
