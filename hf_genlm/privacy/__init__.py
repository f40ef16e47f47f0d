"""What a model may give away of the text that it learned from: attacks on it, and training that bounds it."""
