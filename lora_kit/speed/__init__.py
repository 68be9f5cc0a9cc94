"""Fast training arithmetic and process settings."""
