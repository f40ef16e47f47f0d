"""Attacks that measure what a model reveals of its training text."""
