"""From files to training rows.

`corpus.read_corpus` is the way in: `locating` finds the files, `sources` reads them, `raw_files` unpacks
them, `formats` decodes their texts, `scrubbing` replaces personal data, `store` holds the documents. The
corpus is split, and freed of what `duplicates` finds. `tokenizer` trains a vocabulary, `encoding` turns
documents into ids (by `fast_bpe` where that is exact, stored in `cache`), and `packing` cuts the ids into
rows; `languages` balances them. `streaming` and `packed_stream` do the same for text that is read while it is
trained on. `canaries` plants secrets for an audit; `vector_files` reads word vectors.
"""
