"""The recipe of a run: fields, defaults, ranges, and how they are read."""
