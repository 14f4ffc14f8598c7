"""Pairs of images and masks."""
