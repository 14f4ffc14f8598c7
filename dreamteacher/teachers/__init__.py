"""Frozen generators that teach."""
