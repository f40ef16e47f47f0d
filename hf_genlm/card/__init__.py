"""The model card: template, front matter, sections and the Hub's rules."""
