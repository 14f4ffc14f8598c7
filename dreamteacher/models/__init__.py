"""What is trained: students, regressor, interpreter."""
