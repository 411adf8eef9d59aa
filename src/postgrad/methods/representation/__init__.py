"""Representation learning: contrasts between views and between texts."""
