"""Curves, plots, Markdown and HTML reports."""
