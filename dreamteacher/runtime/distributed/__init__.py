"""Several processes that do what one does."""
