"""Synthetic recall tasks: which decoder remembers how far."""
