"""The corpus of a run as token ids, and the tokenizer that made them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_genlm.recipe import Recipe, TrainingRecipe
from hf_genlm.run_folder import RunFolder, write_json
from hf_genlm.text.cache import Cache, cache_folder
from hf_genlm.text.corpus import Corpus, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.packing import PackedRows
from hf_genlm.text.store import Documents
from hf_genlm.text.tokenizer import load_tokenizer, train_tokenizer
from hf_genlm.training.word_vectors import count_words


@dataclasses.dataclass
class TokenizedCorpus:
    """Both splits as token ids, with the tokenizer that made them.

    `words` counts those of the training text, for word vectors alone: otherwise it is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenizedDocuments
    validation: TokenizedDocuments
    words: dict[str, int]

    @property
    def n_tokens(self) -> int:
        """Of the training text."""
        return self.train.n_tokens

    def rows(self, training: TrainingRecipe) -> PackedRows:
        """What a resolved recipe trains on."""
        return PackedRows(
            self.train,
            row_length=training.row_length,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
        )

    def known_ids(self, rows: PackedRows) -> np.ndarray:
        """(n,): all of the training text that is at hand as ids."""
        return self.train.ids


def prepare_corpus(run: RunFolder, recipe: Recipe) -> TokenizedCorpus:
    """Read, split and tokenize the corpus; writes corpus.json and tokenizer/."""

    def note(message: str) -> None:
        run.log("note", message=message)

    cache = Cache(cache_folder() if recipe.corpus.cache else None, note)
    corpus = read_corpus(recipe.corpus)
    run.log("corpus", **{name: corpus.report[name] for name in ("description", "train", "validation")})
    text = corpus.report["train"]
    tokenizer = tokenizer_of(run, recipe, corpus.train, text["bytes"], cache, text["sha256"])
    words = count_words(corpus.train) if recipe.vectors.path is not None else {}
    train, validation = _encode_splits(run, tokenizer, corpus, cache, note)
    tokenized = TokenizedCorpus(tokenizer, train, validation, words)
    write_json(run.corpus, corpus.report)
    run.log(
        "tokenized",
        vocab_size=len(tokenizer),
        train_tokens=tokenized.train.n_tokens,
        validation_tokens=tokenized.validation.n_tokens,
        bytes_per_token=round(
            corpus.report["validation"]["bytes"] / max(1, tokenized.validation.n_tokens), 3
        ),
    )
    return tokenized


def tokenizer_of(
    run: RunFolder,
    recipe: Recipe,
    documents: Documents,
    n_bytes: int,
    cache: Cache | None = None,
    sha256: str | None = None,
) -> PreTrainedTokenizerBase:
    """The recipe's own tokenizer, or one that is trained on `documents`, of a text of `n_bytes`; saved to
    tokenizer/."""
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.path)
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token  # as in our own: what stands before a document
    else:
        run.tell("progress", task="tokenizer", done=0, total=None)
        tokenizer = train_tokenizer(documents, recipe.tokenizer, n_bytes, cache, sha256)
    recipe.tokenizer.vocab_size = len(tokenizer)
    tokenizer.save_pretrained(run.tokenizer)
    return tokenizer


def _encode_splits(
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    cache: Cache,
    note: Callable[[str], None],
) -> Sequence[TokenizedDocuments]:
    encoded = []
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):

        def on_progress(done: int, total: int, split: str = split) -> None:
            run.tell("progress", task=f"encoding {split}", done=done, total=total)

        sha256 = corpus.report[split]["sha256"]
        encoded.append(encode_documents(tokenizer, documents, on_progress, note, cache, sha256))
        corpus.report[split]["tokens"] = encoded[-1].n_tokens
    return encoded
