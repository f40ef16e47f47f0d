"""The corpus of a run as token ids, and the tokenizer that made them."""

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from hf_genlm.recipe import Recipe
from hf_genlm.run_folder import RunFolder, write_json
from hf_genlm.text.cache import Cache, cache_folder
from hf_genlm.text.corpus import Corpus, notes_on, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
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


def prepare_corpus(run: RunFolder, recipe: Recipe) -> TokenizedCorpus:
    """Read, split and tokenize the corpus; writes corpus.json and tokenizer/."""

    def note(message: str) -> None:
        run.log("note", message=message)

    cache = Cache(cache_folder() if recipe.corpus.cache else None, note)
    corpus = read_corpus(recipe.corpus)
    run.log("corpus", **{name: corpus.report[name] for name in ("description", "train", "validation")})
    for message in notes_on(corpus.report):
        note(message)
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.path)
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token  # as in our own: what stands before a document
    else:
        run.tell("progress", task="tokenizer", done=0, total=None)
        text = corpus.report["train"]
        tokenizer = train_tokenizer(corpus.train, recipe.tokenizer, text["bytes"], cache, text["sha256"])
    recipe.tokenizer.vocab_size = len(tokenizer)
    tokenizer.save_pretrained(run.tokenizer)
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
