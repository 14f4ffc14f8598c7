"""The method: a student learns a teacher's features."""
