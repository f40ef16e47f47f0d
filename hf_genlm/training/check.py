"""Check a recipe before any text is read: one place for every rule that a recipe can break."""

import os
from dataclasses import replace

import torch
from transformers.utils import is_torch_bf16_gpu_available

from hf_genlm.config.recipe import Recipe
from hf_genlm.config.settings import Facts, Settings
from hf_genlm.config.settle import settle
from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.loading import loading_errors, source_of
from hf_genlm.model import GenLMConfig
from hf_genlm.privacy.mechanism import check_installed
from hf_genlm.text.canaries import check_canaries
from hf_genlm.text.duplicates import check_near_duplicates
from hf_genlm.text.languages import check_languages
from hf_genlm.text.scrubbing import check_scrubbing
from hf_genlm.text.vector_files import peek_dimension
from hf_genlm.training import processes
from hf_genlm.training.callbacks import read_milestones
from hf_genlm.training.trackers import check_trackers


def read_facts(recipe: Recipe) -> Facts:
    """Facts that files beside the text hold: the model to continue from, the dimension of word vectors.

    Raises:
        UserError: no model of this package, or no word vectors, at the place that the recipe names.
    """
    facts, source = Facts(), recipe.model.init_from
    if source is not None:
        facts = replace(facts, base=config_of(source), base_source=source_of(source))
    if recipe.vectors.path is not None:
        facts = replace(facts, vector_size=peek_dimension(recipe.vectors.path))
    return facts


def config_of(source: str) -> GenLMConfig:
    """Config of the model in a run folder, a model folder or at a Hub id.

    Raises:
        UserError: no model of this package.
    """
    with loading_errors(source):
        config = GenLMConfig.from_pretrained(source_of(source))
    if config.model_type != "genlm":
        raise UserError(f"--from {source!r} is a model of {config.model_type}, no model of this package")
    return config


def check(recipe: Recipe) -> Facts:
    """Check `recipe` by itself and in this process group; return the facts that were read for it.

    Raises:
        UserError: the first rule that it breaks.
    """
    facts = read_facts(recipe)
    facts = replace(facts, is_sharded=processes.is_sharded())
    settings = settle(recipe, facts)
    corpus, training = settings.corpus, settings.training
    if settings.privacy.epsilon is not None:
        _check_private(settings)
    if settings.architecture.is_ngram:
        _check_ngram(settings)
    has_accelerator = torch.accelerator.is_available()
    if training.dtype == "bfloat16" and has_accelerator and not is_torch_bf16_gpu_available():
        raise UserError(
            "training.dtype=bfloat16: the accelerator of this machine does not compute it: give "
            "training.dtype=auto or float32"
        )
    backend = training.torch_compile_backend
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise UserError(f"unknown training.torch_compile_backend {backend!r}{did_you_mean(backend, known)}")
    check_trackers(training.report_to)
    read_milestones(training.milestone_words)
    check_languages(corpus)
    check_canaries(settings.privacy, corpus)
    check_scrubbing(corpus)
    check_near_duplicates(corpus)
    if corpus.stream and training.carry_state:
        raise UserError(
            "training.carry_state = true needs all rows at hand, and --stream has none of them: leave one out"
        )
    if corpus.temperature != 1 and training.carry_state:
        raise UserError(
            "training.carry_state = true reads the text in its order, and corpus.temperature = "
            f"{corpus.temperature:g} reads parts of it again and again: leave one out"
        )
    if processes.is_sharded():
        _check_sharded(settings)
    processes.rows_per_process(training.batch_size, training.gradient_accumulation_steps)
    return facts


def _check_sharded(settings: Settings) -> None:
    """Refuse what needs whole matrices, where each process holds a part of them."""
    refused = {
        "model.ngram_order": (settings.architecture.holds_counts, "model.ngram_order=0"),
        "training.optimizer=muon": (settings.training.optimizer == "muon", "training.optimizer=adamw"),
        "vectors.frozen=true": (settings.vectors.frozen, "vectors.frozen=false"),
    }
    default = "SHARDED_STATE_DICT" if os.environ.get("FSDP_VERSION") == "2" else ""
    if os.environ.get("FSDP_STATE_DICT_TYPE", default) == "SHARDED_STATE_DICT":
        raise UserError(
            "a checkpoint of FSDP's shards executes what it names when it is read, and is not resumed: set "
            "fsdp_state_dict_type: FULL_STATE_DICT"
        )
    for name, (is_stated, remedy) in refused.items():
        if is_stated:
            raise UserError(
                f"{name} needs whole matrices, and FSDP and DeepSpeed give each process a part of them: "
                f"train by data parallelism alone (--processes), or --set {remedy}"
            )


def _check_ngram(settings: Settings) -> None:
    """Refuse what counts cannot do: they read the text once, in one process, and have no weights to train."""
    # what is stated: (it is stated, the remedy)
    refused = {
        "--from": (settings.model.init_from is not None, "count the old and the new text together"),
        "--vectors": (settings.vectors.path is not None, "leave it out"),
        "--size": (settings.model.size is not None, "give model.ngram_order and model.ngram_entries"),
        "--processes": (processes.count() > 1, "leave it out"),
    }
    for name, (is_stated, remedy) in refused.items():
        if is_stated:
            raise UserError(f"{name} is for a network, and the decoder ngram is a table of counts: {remedy}")


def _check_private(settings: Settings) -> None:
    """Refuse what the guarantee for single documents does not cover."""
    training, corpus = settings.training, settings.corpus
    # field: (it is stated, the reason, the remedy)
    refused = {
        "--decoder ngram": (
            settings.architecture.is_ngram,
            "its counts keep the text word for word",
            "choose another decoder",
        ),
        "model.ngram_order": (
            settings.architecture.holds_counts,
            "counts keep the text word for word",
            "--set model.ngram_order=0",
        ),
        "training.init=bigrams": (
            training.init == "bigrams",
            "the counts of its pairs of tokens go into the model",
            "--set training.init=random",
        ),
        "vectors.path": (
            settings.vectors.path is not None,
            "the words of the text decide which vectors are taken",
            "leave it out",
        ),
        "corpus.stream=true": (corpus.stream, "the number of documents is not known", "leave it out"),
        "corpus.near_duplicates": (
            corpus.near_duplicates is not None,
            "one document decides which others are kept",
            "leave it out",
        ),
        "corpus.temperature": (
            corpus.temperature != 1,
            "some documents are read more often than others",
            "--set corpus.temperature=1",
        ),
        "training.carry_state=true": (
            training.carry_state,
            "a state passes from document to document",
            "--set training.carry_state=false",
        ),
        "training.torch_compile_backend": (
            training.torch_compile_backend is not None,
            "compiled code does not show the gradients of single documents",
            "--set training.torch_compile_backend=null",
        ),
        "training.milestone_words": (
            bool(training.milestone_words),
            "words are drawn, not counted",
            "leave it out",
        ),
        "--processes": (
            processes.count() > 1,
            "documents are drawn by one process",
            "--processes 1, and training.gradient_accumulation_steps for a larger batch",
        ),
    }
    for name, (is_stated, reason, remedy) in refused.items():
        if is_stated:
            raise UserError(f"--epsilon and {name} do not go together, as {reason}: {remedy}")
    check_installed()
