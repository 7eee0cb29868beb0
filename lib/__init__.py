"""Machinery that a reader of the algorithm may skip."""
