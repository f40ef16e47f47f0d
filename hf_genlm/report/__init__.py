"""Figures of runs and audits, and reports in HTML and Markdown."""
