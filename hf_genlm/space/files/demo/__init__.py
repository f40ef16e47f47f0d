"""The demo: one or two causal language models, what they write, how sure they are, and what goes on inside.

It stands alone: gradio, torch and transformers are all that it needs.
"""
