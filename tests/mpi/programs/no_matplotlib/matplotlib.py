"""Stands before the real one on the path: as where it is not installed."""

raise ImportError("hidden")
