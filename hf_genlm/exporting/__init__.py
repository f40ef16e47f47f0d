"""A trained model in the formats of other runtimes: `hf-genlm export MODEL --to FORMAT --out DIR`.

What is written computes the logits of the model, or is refused with the reasons.
"""
