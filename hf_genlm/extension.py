"""New tokens for a trained model, for example for another language.

The new merges come after the old ones, and none makes a token that exists. So a text is first merged as
before, and the new merges join the result: with every new token replaced by its pieces, the ids of any text
are those of the old tokenizer. Where no new pair occurs, the ids do not change.
"""

import heapq
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import atomic_folder, require_new_folder, write_text
from hf_genlm.loading import hub_id_of, load
from hf_genlm.report import document
from hf_genlm.run_folder import Listener
from hf_genlm.text.corpus import notes_on, read_documents, with_sources
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.fast_bpe import MAX_TOKEN, MAX_WORD
from hf_genlm.text.languages import check_languages
from hf_genlm.text.sources import Sources
from hf_genlm.text.store import TURN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExtendedModel:
    """A model with new tokens that `extend` wrote to the folder `path`."""

    path: Path
    n_tokens: int  # in the vocabulary, new ones included
    n_new_tokens: int
    n_bytes: int  # UTF-8 bytes of the text that the tokens were learned from
    bytes_per_token_before: float  # on that text, by the old tokenizer
    bytes_per_token: float  # by the new one


def extend(
    model: str,
    sources: Sources,
    *,
    n_new_tokens: int,
    out: str | Path,
    keep: Sequence[str] = (),
    corpus: CorpusRecipe | None = None,
    listener: Listener | None = None,
) -> ExtendedModel:
    """Learn tokens from a text, add them to a trained model, and save model, tokenizer and card.

    Args:
        model: a run folder, a model folder or a Hub id.
        sources: files, folders, globs or Hub data sets, or a mapping from language code to such a list.
        n_new_tokens: tokens to add.
        out: the folder to write; it must not exist or must be empty.
        keep: sources of text whose token ids must not change.
        corpus: how the sources are read (encoding, text column and so on); the defaults if None.
        listener: receives the events `note` and `progress`.

    Raises:
        UserError: a source or the model cannot be used, `out` holds files, or the text has fewer than
            `n_new_tokens` tokens to learn.
    """
    tell = listener or (lambda event, fields: None)
    out = Path(out)
    if n_new_tokens < 1:
        raise UserError(f"{n_new_tokens} new tokens: name how many to add, at least 1")
    if not sources:
        raise UserError("there is no text to learn tokens from: name a SOURCE, or --source CODE=SOURCE")
    recipe = with_sources(corpus or CorpusRecipe(), sources)
    check_languages(recipe)
    require_new_folder(out)
    documents, report = read_documents(sources, recipe)
    for message in notes_on(report):
        tell("note", {"message": message})
    kept = [document.text for document in read_documents(keep, recipe)[0]] if keep else []
    trained: Any
    tokenizer: Any
    trained, tokenizer = load(model)
    n_before = encode_documents(tokenizer, documents).n_tokens
    extension = extend_bpe(
        tokenizer.backend_tokenizer,
        (text.replace(TURN, "\n") for _, text in documents.texts()),
        n_new_tokens,
        kept,
        lambda done, total: tell("progress", {"task": "new tokens", "done": done, "total": total}),
    )
    extend_model(trained, extension.pieces)
    with atomic_folder(out) as folder:
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "tokenizer.json", json.dumps(extension.state, ensure_ascii=False))
        extended: Any = load(str(folder))[1]
        card = extension_card(out.name, Path(model).name, hub_id_of(model), len(extended), n_new_tokens)
        write_text(folder / "README.md", card)
    n_bytes = int(documents.n_bytes.sum())
    n_after = encode_documents(extended, documents).n_tokens
    return ExtendedModel(out, len(extended), n_new_tokens, n_bytes, n_bytes / n_before, n_bytes / n_after)


@torch.no_grad()
def extend_model(model: "PreTrainedModel", pieces: Mapping[int, Sequence[int]]) -> None:
    """Add a row to the embedding, the head and its bias for each new token id, in place.

    The row is the mean of the rows of the old ids that the token stands for. Nothing else changes, so a text
    that keeps its ids keeps its logits over the old vocabulary; its loss rises by -log(1 - p), where p is the
    probability that the new tokens take.

    Args:
        model: any causal model with a token embedding (V, R) and a linear head (V, D).
        pieces: new id -> the old ids that it stands for; the new ids follow V.
    """
    embedding: Any = model.get_input_embeddings()
    n_old = len(embedding.weight)
    model.resize_token_embeddings(max(n_old, 1 + max(pieces)), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight, head.weight] + ([] if head.bias is None else [head.bias])
    for table in tables:  # tied tables get the same value twice
        for new_id, old_ids in pieces.items():
            table[new_id] = table[torch.tensor(old_ids)].mean(0)


def extension_card(name: str, base: str, base_id: str | None, n_tokens: int, n_new_tokens: int) -> str:
    """Model card of an extended model before any further training; `base_id` is None for a base model that
    is not on the Hub."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["genlm", "custom_code"],
        base_model=base_id,
    )
    return document.without_controls(
        f"---\n{data.to_yaml()}\n---\n\n# {document.prose(name)}\n\n"
        f"{document.code(base_id or base)} with {n_new_tokens:,} new tokens, {n_tokens:,} in all, by "
        "`hf-genlm extend`. The row of a new token is the mean of the rows of its pieces; the model was not "
        "trained further.\n"
    )


_MIN_COUNT = 2  # a merge seen once memorises
Pair = tuple[str, str]


class Extension(NamedTuple):
    """An extended tokenizer: `state` is the content of tokenizer.json, `pieces` maps each new id to the old
    ids that it stands for."""

    state: dict[str, Any]
    pieces: dict[int, list[int]]


def extend_bpe(
    backend: Tokenizer,
    texts: Iterable[str],
    n_tokens: int,
    keep: Iterable[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Extension:
    """Learn `n_tokens` more tokens on `texts`, the most frequent pair first, as if training had continued.

    Args:
        backend: byte-level, without a normalizer.
        keep: texts whose ids must not change: no pair that occurs in them is merged.
        on_progress: called with (tokens found, `n_tokens`).

    Raises:
        UserError: the tokenizer is of another kind, or the texts have fewer tokens to learn.
    """
    state = json.loads(backend.to_str())
    model, decoder = state["model"], (state["decoder"] or {}).get("type")
    is_plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if model["type"] != "BPE" or decoder != "ByteLevel" or state["normalizer"] is not None or not is_plain:
        raise UserError(
            f"this tokenizer is {model['type']} with the decoder {decoder}: only a byte-level BPE without a "
            "normalizer can be extended"
        )
    words = _segment(backend, texts, MAX_WORD)
    banned = {pair for pieces in _segment(backend, keep) for pair in itertools.pairwise(pieces)}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    first = max(vocabulary.values()) + 1
    merges = []
    for pair in _merges(words, banned, set(vocabulary)):
        merges.append(pair)
        if on_progress is not None:
            on_progress(len(merges), n_tokens)
        if len(merges) == n_tokens:
            break
    if len(merges) < n_tokens:
        raise UserError(
            f"--vocab-size +{n_tokens}: this text has {len(merges)} more tokens to learn at most; ask for "
            "fewer, or give more text"
        )
    pieces = {number: [number] for number in vocabulary.values()}
    for number, (left, right) in enumerate(merges, start=first):
        vocabulary[left + right] = number
        model["vocab"][left + right] = number
        pieces[number] = pieces[vocabulary[left]] + pieces[vocabulary[right]]
    as_lists = not model["merges"] or isinstance(model["merges"][0], list)
    model["merges"] += [[*pair] if as_lists else " ".join(pair) for pair in merges]
    return Extension(state, {number: pieces[number] for number in range(first, first + n_tokens)})


def _segment(
    backend: Tokenizer, texts: Iterable[str], max_bytes: int = sys.maxsize
) -> Counter[tuple[str, ...]]:
    """Count the words of `texts`, each as its tokens by `backend`; words of one token are left out.

    A word of more than `max_bytes` is cut: learning takes time with its square.
    """
    words: Counter[str] = Counter()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words.update(word[i : i + max_bytes] for i in range(0, len(word), max_bytes))
    found: Counter[tuple[str, ...]] = Counter()
    for word, n in words.items():
        tokens = tuple(token.value for token in backend.model.tokenize(word))
        if len(tokens) > 1:
            found[tokens] += n
    return found


def _merges(words: Counter[tuple[str, ...]], banned: set[Pair], taken: set[str]) -> Iterable[Pair]:
    """Pairs to merge, in order: the most frequent pair of `words`, ties in alphabetical order.

    A pair in `banned`, or one that makes a token in `taken` or of more than `MAX_TOKEN` bytes, is skipped.
    Adds the new tokens to `taken`.
    """
    pieces = [list(word) for word in words]
    counts = list(words.values())
    n_of: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    queue: list[tuple[int, Pair]] = []  # holds outdated counts too; only an entry equal to `n_of` is valid

    def add(i: int, sign: int) -> set[Pair]:
        for pair in itertools.pairwise(pieces[i]):
            n_of[pair] += sign * counts[i]
            if sign > 0:
                where[pair].add(i)
        return set(itertools.pairwise(pieces[i]))

    def is_skipped(negative_count: int, pair: Pair) -> bool:
        joined = pair[0] + pair[1]
        return -negative_count != n_of[pair] or pair in banned or joined in taken or len(joined) > MAX_TOKEN

    changed: set[Pair] = set().union(*(add(i, 1) for i in range(len(pieces))))
    while True:
        for pair in changed:
            heapq.heappush(queue, (-n_of[pair], pair))
        changed = set()
        while queue and is_skipped(*queue[0]):
            heapq.heappop(queue)
        if not queue or -queue[0][0] < _MIN_COUNT:
            return
        best = heapq.heappop(queue)[1]
        for i in where.pop(best):
            changed |= add(i, -1)
            pieces[i] = _merge(pieces[i], best)
            changed |= add(i, 1)
        taken.add(best[0] + best[1])
        yield best


def _merge(word: list[str], pair: Pair) -> list[str]:
    """`word` with every occurrence of `pair`, from the left, merged."""
    found: list[str] = []
    for piece in word:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
