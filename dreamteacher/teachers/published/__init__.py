"""Teachers that others published."""
