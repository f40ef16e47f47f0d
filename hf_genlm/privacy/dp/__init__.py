"""Differential privacy: the guarantee, per-example gradients, and the noise."""
