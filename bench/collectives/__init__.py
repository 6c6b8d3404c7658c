"""Allreduces side by side."""
