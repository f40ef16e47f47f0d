"""What a stream is measured on, and the beginning of it that its tokenizer is trained on: both bounded."""

import hashlib
from dataclasses import dataclass
from typing import Any

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.text.corpus import count_text, named, read_documents
from hf_genlm.text.formats import Parts
from hf_genlm.text.store import Documents, DocumentWriter
from hf_genlm.text.streaming import DocumentStream, HeldOut, digest_of, open_stream

_LARGEST_HELD = 0.25  # of what is held out: a longer document is trained on
_SEARCHED = 4  # times the text in which what is held out is expected to be found


@dataclass
class StreamedText:
    """A stream without its validation text, that text, and the content of corpus.json."""

    stream: DocumentStream
    validation: Documents
    report: dict[str, Any]


def read_stream(recipe: CorpusRecipe) -> StreamedText:
    """Open the stream of a recipe, and read its validation text: `recipe.validation`, or what is held out.

    The same recipe over the same files gives the same text. None of it is trained on, wherever it stands.

    Raises:
        UserError: a source cannot be used, or nothing can be held out.
    """
    stream = open_stream(recipe)
    if recipe.validation:
        validation, read = read_documents(recipe.validation, recipe, "validation")
        files = read["files"]
    else:
        validation, files = hold_out(stream, recipe), []
    unknown = dict.fromkeys(("documents", "bytes", "characters", "tokens", "sha256"))
    shards = [
        {"name": shard.name, "bytes": shard.n_bytes, "sha256": None, "documents": None, **shard.sampled()}
        for shard in stream.shards
    ]
    report = {
        "sources": list(recipe.sources),
        "description": named(shards),
        "python": None,
        "encoding": recipe.encoding,
        "stream": {"weights": recipe.weights, "shuffle_buffer": recipe.shuffle_buffer},
        "split": {
            "method": "given" if recipe.validation else "hash",
            "seed": recipe.split_seed,
            "fraction": recipe.validation_fraction,
        },
        "train": unknown,
        "validation": count_text(validation),
        "files": [*shards, *files],
    }
    if stream.scrubber is not None:
        report["scrubbed"] = stream.scrubber.to_json(None)
    return StreamedText(stream.without(HeldOut(validation)), validation, report)


def hold_out(stream: DocumentStream, recipe: CorpusRecipe) -> Documents:
    """Documents from the beginning of a stream: those whose hash is low, up to `validation_bytes`.

    A text is held out once, however often it occurs, and `HeldOut` keeps all its copies from training.
    Documents longer than a quarter of `validation_bytes` are left to training. Where no hash is low, the
    lowest is taken.

    Raises:
        UserError: there are not two different documents that are short enough.
    """
    writer, held = DocumentWriter(), HeldOut()
    walk = stream.walk()
    longest = int(_LARGEST_HELD * recipe.validation_bytes)
    lowest: tuple[float, str] | None = None
    n_bytes = n_walked = n_different = 0
    at_most = _SEARCHED * recipe.validation_bytes / recipe.validation_fraction
    for parts in walk.texts():
        if parts is None or walk.passes or n_walked > at_most:
            break
        text, is_whole = _up_to(parts, longest)
        n_walked += len(text)
        if not is_whole or len(text.encode()) > longest or text in held:
            n_different += text not in held
            continue
        n_different += 1
        share = _share(text, recipe.split_seed)
        if lowest is None or share < lowest[0]:
            lowest = share, text
        if share < recipe.validation_fraction:
            n_bytes += len(text.encode())
            if n_bytes > recipe.validation_bytes:
                break
            held.add(text)
            writer.add((text,), "stream")
    if not len(writer) and lowest is not None:
        writer.add((lowest[1],), "stream")
    if not len(writer) or n_different < 2:
        raise UserError(
            f"nothing can be held out of the first {n_walked:,} characters: there are not two documents, one "
            f"of them of at most {longest:,} bytes; hold out a file of your own by --validation FILE"
        )
    return writer.documents()


def beginning(stream: DocumentStream, n_characters: int) -> Documents:
    """The first pass of a stream, at most so many characters of it."""
    writer, walk, left = DocumentWriter(), stream.walk(), n_characters
    for parts in walk.texts():
        if parts is None or walk.passes or left <= 0:
            break
        text, _ = _up_to(parts, left)
        left -= len(text)
        writer.add((text,), "stream")
    return writer.documents()


def _up_to(parts: Parts, n_characters: int) -> tuple[str, bool]:
    """The beginning of a text, and whether it is all of it; the other parts are passed over."""
    taken: list[str] = []
    left, is_whole = n_characters, True
    for part in parts:
        is_whole = len(part) <= left
        taken.append(part[:left])
        left -= len(taken[-1])
        if not is_whole:
            break
    return "".join(taken), is_whole


def _share(text: str, seed: int) -> float:
    """A number from 0 to 1 that the text and the seed decide."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest_of(text)).digest()[:8], "big") / 2**64
