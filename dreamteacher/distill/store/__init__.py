"""A teacher's features on disk."""
