"""Teachers that are trained here."""
