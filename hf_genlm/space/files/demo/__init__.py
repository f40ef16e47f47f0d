"""The demo: text that one or two causal language models generate, token probabilities, states and attention.

It runs without the package that wrote it; it needs gradio, torch and transformers.
"""
