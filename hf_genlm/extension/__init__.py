"""New tokens for a trained model, for example for another language."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_genlm.config.recipe import CorpusRecipe
from hf_genlm.errors import UserError
from hf_genlm.extension.tokens import extend_bpe
from hf_genlm.files import atomic_folder, require_new_folder, write_text
from hf_genlm.loading import hub_id_of, load
from hf_genlm.report import document
from hf_genlm.run_folder import Listener
from hf_genlm.text.corpus import notes_on, read_documents, with_sources
from hf_genlm.text.encoding import encode_documents
from hf_genlm.text.languages import check_languages
from hf_genlm.text.sources import Sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExtendedModel", "extend", "extend_bpe", "extend_model", "extension_card"]


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
        (text for _, text in documents.texts()),
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
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {document.prose(name)}\n\n"
        f"{document.code(base_id or base)} with {n_new_tokens:,} new tokens, {n_tokens:,} in all, by "
        "`hf-genlm extend`. The row of a new token is the mean of the rows of its pieces; the model was not "
        "trained further.\n"
    )
