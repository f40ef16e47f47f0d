"""From files to packed rows: corpus, tokenizer, packing."""
