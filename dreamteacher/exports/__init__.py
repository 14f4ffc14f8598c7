"""Backbones for other libraries."""
