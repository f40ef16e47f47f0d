"""Build the model of a run, and give it its start: weights of another model, word vectors, bigram counts."""

import copy

import torch
from transformers import PreTrainedTokenizerFast

from hf_genlm.config.settings import Settings
from hf_genlm.errors import UserError
from hf_genlm.loading import loading_errors, source_of
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import RunFolder
from hf_genlm.text.packing import DocumentWindows
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS, init_from_bigrams
from hf_genlm.training.corpus import Rows, StreamedCorpus, TokenizedCorpus
from hf_genlm.training.counting import NgramCounts
from hf_genlm.training.word_vectors import start_from_vectors


def new_model(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | None = None,
    counts: NgramCounts | None = None,
) -> GenLMForCausalLM:
    """A model with random weights, for the vocabulary of `tokenizer`, and with these counts."""
    config = copy.deepcopy(settings.architecture)
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = GenLMForCausalLM(config)
    if counts is not None:
        counts.fill(model)
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def start_model(
    run: RunFolder,
    model: GenLMForCausalLM,
    settings: Settings,
    corpus: TokenizedCorpus | StreamedCorpus,
    rows: Rows,
    is_new: bool,
) -> torch.Tensor | None:
    """Give `model` the start that its settings name; not `is_new`: a checkpoint brings the weights.

    Returns:
        (V,) True for tokens whose word vectors are to stay; None if all embeddings train.

    Raises:
        UserError: the word vectors or the weights to start from cannot be used.
    """
    frozen = None
    if settings.model.init_from is not None and is_new:
        _load_weights(model, settings.model.init_from)
    if settings.vectors.path is not None:
        ids = corpus.known_ids(rows)  # type: ignore[arg-type]
        found = start_from_vectors(run, model, corpus.tokenizer, corpus.words, ids, settings)
        frozen = torch.from_numpy(found) if settings.vectors.frozen else None
    if settings.training.init == "bigrams" and is_new:
        assert not isinstance(rows, DocumentWindows), "nothing starts from counts of a private text"
        tokens = rows.first_tokens(MAX_COUNTED_TOKENS)
        bigrams = init_from_bigrams(model, tokens, keep_embedding=settings.vectors.path is not None)
        run.log("bigrams", tokens=bigrams.n_tokens, distinct=bigrams.n_bigrams)
    return frozen


def _load_weights(model: GenLMForCausalLM, source: str) -> None:
    """Copy the weights of the model in `source`, whose config `model` was made with."""
    with loading_errors(source):
        base = GenLMForCausalLM.from_pretrained(source_of(source), use_safetensors=True)
    if base.config.vocab_size != model.config.vocab_size:
        raise UserError(f"the tokenizer in {source!r} has not as many tokens as its model: save both again")
    model.load_state_dict(base.state_dict())
