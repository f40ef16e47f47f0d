"""A differentially private run: what it may not do, what it prefers, its noise, and what it promises at the
end."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from hf_genlm.config.recipe import CorpusRecipe, Recipe, TrainingRecipe
from hf_genlm.errors import UserError
from hf_genlm.files import write_json
from hf_genlm.privacy.dp.mechanism import KEY_BYTES, check_installed, choose_delta, plan_guarantee
from hf_genlm.run_folder import RunFolder
from hf_genlm.run_schemas import GuaranteeFile
from hf_genlm.text.corpus import read_corpus
from hf_genlm.text.store import Documents
from hf_genlm.training import processes

if TYPE_CHECKING:
    from hf_genlm.training.budget import Budget
    from hf_genlm.training.private_step import PrivateState
    from hf_genlm.training.streamed import StreamedCorpus
    from hf_genlm.training.tokenized import TokenizedCorpus

_WEIGHT_DECAY = 0.1  # noise keeps a text from being learned by heart


def prefer_private(recipe: Recipe) -> None:
    """Choose what was left open as noise wants it: no statistics of the text, and few parameters. Whether a
    document is held out is decided by itself alone."""
    model, training = recipe.model, recipe.training
    recipe.corpus.split_by_hash = True
    model.bigram_size = model.bigram_size or 0
    training.init = training.init or "random"
    if training.weight_decay is None:
        training.weight_decay = _WEIGHT_DECAY


def check_private(recipe: Recipe) -> None:
    """What a private run of a resolved recipe may not do.

    Raises:
        UserError: that, and what to do instead; or Opacus is not installed.
    """
    training, corpus = recipe.training, recipe.corpus
    refused = {
        "training.init=bigrams": (
            training.init == "bigrams",
            "the counts of its pairs of tokens go into the model",
            "--set training.init=random",
        ),
        "vectors.path": (
            recipe.vectors.path is not None,
            "which words the text has decides which vectors are taken",
            "leave it out",
        ),
        "corpus.stream=true": (corpus.stream, "how many documents there are is not known", "leave it out"),
        "corpus.near_duplicates": (
            corpus.near_duplicates is not None,
            "one document decides then which others are kept",
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
            "the gradients of single documents are not seen in what it makes",
            "--set training.torch_compile_backend=null",
        ),
        "training.milestone_words": (
            bool(training.milestone_words),
            "the words that were read are drawn, not counted",
            "leave it out",
        ),
        "--processes": (
            processes.count() > 1,
            "documents are drawn by one process",
            "--processes 1, and training.gradient_accumulation_steps for a larger batch",
        ),
    }
    for name, (is_so, reason, remedy) in refused.items():
        if is_so:
            raise UserError(f"--epsilon and {name} do not go together, as {reason}: {remedy}")
    check_installed()


def public_text(note: Callable[[str], None]) -> tuple[Documents, int]:
    """(documents, bytes) of a text that everyone has, for the vocabulary: the library source of Python."""
    note(
        "the vocabulary is learned from Python's library source, as it must not be from a private text; a "
        "tokenizer of public text of its kind serves better: --set tokenizer.path=FOLDER (hf-genlm tokenizer)"
    )
    corpus = read_corpus(CorpusRecipe())
    return corpus.train, corpus.report["train"]["bytes"]


def tokens_to_plan_by(recipe: Recipe, corpus: "TokenizedCorpus | StreamedCorpus") -> int | None:
    """Tokens of the training text, which decide on size, steps and decay; of a private text, where a long
    document would decide alone, those of full rows, one for each document."""
    if recipe.privacy.epsilon is None:
        return corpus.n_tokens
    assert recipe.training.max_seq_length is not None
    return len(cast("TokenizedCorpus", corpus).train) * recipe.training.max_seq_length


def steps_of(recipe: Recipe) -> TrainingRecipe:
    """What Trainer is told: a batch of it is one step, and documents alone are clipped."""
    return recipe.training.model_copy(
        update={"batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    )


def begin_private(
    run: RunFolder, recipe: Recipe, corpus: "TokenizedCorpus", budget: "Budget"
) -> "PrivateState":
    """The guarantee of a new run, and its key; a run by the clock has its steps counted out beforehand.

    Raises:
        UserError: as `plan_guarantee`.
    """
    from hf_genlm.training.private_step import PrivateState

    choose_delta(recipe.privacy, len(corpus.train))
    if budget.seconds is not None:
        _count_steps(run, recipe, corpus, budget)
    run.tell("progress", task="choosing the noise", done=0, total=None)
    n_drawn = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    guarantee = plan_guarantee(recipe.privacy, len(corpus.train), n_drawn, budget.steps)
    run.log("guarantee", **dataclasses.asdict(guarantee))
    return PrivateState(guarantee, os.urandom(KEY_BYTES))


def _count_steps(run: RunFolder, recipe: Recipe, corpus: "TokenizedCorpus", budget: "Budget") -> None:
    from hf_genlm.training.configure import builder_of
    from hf_genlm.training.private_step import measure_private_step
    from hf_genlm.training.trainer import training_arguments_of

    run.tell("progress", task="planning", done=0, total=None)
    began = time.monotonic()
    device = training_arguments_of(run, steps_of(recipe), budget).device
    budget.step_s = measure_private_step(builder_of(corpus.tokenizer, device)(recipe), recipe)
    assert budget.seconds is not None
    budget.seconds = max(budget.step_s, budget.seconds - (time.monotonic() - began))
    budget.steps = max(1, min(budget.steps, int(budget.seconds / budget.step_s)))
    times = (
        budget.steps
        * recipe.training.batch_size
        * recipe.training.gradient_accumulation_steps
        / len(corpus.train)
    )
    message = (
        f"with noise, a step takes {1000 * budget.step_s:.0f} ms: counted out are {budget.steps:,} steps, "
        f"which draw each document {times:.2g} times on average"
    )
    run.log("note", message=message)


def diverged_in_private(step: int, recipe: Recipe) -> UserError:
    """Going back would need the noise of the steps twice."""
    return UserError(
        f"the loss became NaN or infinite at step {step}, and a private run does not go back: start a new "
        f"run with a training.learning_rate well below {recipe.training.learning_rate:g}"
    )


def write_guarantee(run: RunFolder, private: "PrivateState", recipe: Recipe) -> None:
    """privacy.json, after all steps were made."""
    log = run.read_log()
    steps = max(event["steps"] for event in log if event["event"] == "trained")
    not_covered = []
    if sum(event["event"] == "guarantee" for event in log) > 1:
        not_covered.append("what log.jsonl tells of a beginning that was lost before its first checkpoint")
    if recipe.corpus.damaged == "skip":
        not_covered.append("which files were left out: one damaged record takes those beside it along")
    if recipe.model.init_from is not None:
        not_covered.append(f"what the model that it went on from ({recipe.model.init_from}) was trained on")
    if recipe.tokenizer.path is not None:
        not_covered.append("the text that its tokenizer was learned from")
    elif not (recipe.corpus.sources or recipe.corpus.languages):
        not_covered.append("the vocabulary, which was learned from the same text, as everyone has it")
    write_json(run.privacy, private.guarantee.to_json(steps, not_covered), GuaranteeFile)
