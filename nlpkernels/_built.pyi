"""Written by setup.py beside the libraries."""

TORCH: str
