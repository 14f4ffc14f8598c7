"""Pages about runs and teachers."""
