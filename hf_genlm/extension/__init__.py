"""New tokens for a trained model, for example for another language."""
