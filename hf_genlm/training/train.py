"""The main job: from sources to a measured model in a run folder. Run it with `hf-genlm train [SOURCE
...]`."""

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from hf_genlm.config.recipe import Recipe, load_recipe
from hf_genlm.errors import NoSource, UserError
from hf_genlm.evaluation.aggregation import BlockSums
from hf_genlm.evaluation.languages import measure_languages
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import atomic_folder, write_json, write_text
from hf_genlm.loading import hub_id_of
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.run_folder import FollowedRun, Listener, RunFolder, describe_environment
from hf_genlm.run_schemas import EnvironmentFile
from hf_genlm.text.canaries import check_canaries
from hf_genlm.text.duplicates import check_near_duplicates
from hf_genlm.text.languages import check_languages
from hf_genlm.text.packing import DocumentWindows
from hf_genlm.text.scrubbing import check_scrubbing
from hf_genlm.training import processes
from hf_genlm.training.bigram_init import MAX_COUNTED_TOKENS, init_from_bigrams
from hf_genlm.training.budget import Budget, budget_of, resolve
from hf_genlm.training.callbacks import Diverged, read_milestones
from hf_genlm.training.carried_state import StateCallback
from hf_genlm.training.checkpoints import Checkpoint, StopRequest, newest_checkpoint, refuse_code, write_model
from hf_genlm.training.configure import (
    adopt_model,
    adopt_unchanged,
    adopt_vocabulary,
    build_config,
    load_weights,
    mixer_types_of,
    plan_recipe,
    settle_decay,
)
from hf_genlm.training.fit import Job, Rows, fit, likelihood_of
from hf_genlm.training.optimizer import check_optimizer
from hf_genlm.training.plan import tokens_of_a_step
from hf_genlm.training.private import (
    begin_private,
    check_private,
    diverged_in_private,
    steps_of,
    tokens_to_plan_by,
    write_guarantee,
)
from hf_genlm.training.private_step import PrivateState
from hf_genlm.training.streamed import StreamedCorpus, prepare_stream
from hf_genlm.training.tokenized import TokenizedCorpus, prepare_corpus
from hf_genlm.training.trackers import check_trackers, tracking
from hf_genlm.training.trainer import check_compiler, training_arguments_of
from hf_genlm.training.word_vectors import adopt_dimension, start_from_vectors


@contextlib.contextmanager
def _keeping_threads() -> Iterator[None]:
    """A run may take fewer of torch's threads; the process that called for it has its own again then."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_keeping_threads()
def train(
    recipe: Recipe, out: str | Path, listener: Listener | None = None, resume: bool = False
) -> RunFolder:
    """Read the corpus, train tokenizer and model, measure the saved model, and leave all of it in `out`.

    `listener(event, fields)` hears every logged event, and `progress` {task, done, total} within a stage.

    With `corpus.stream`, how much text there is remains unknown: the size and the decay of the weights are
    chosen as for one pass at most, and `training.max_epochs` ends nothing; what ends is read again.

    In a process group every process calls this; the first one alone writes and measures, and the others
    return when it has the model.

    Ctrl-C and SIGTERM end it with a checkpoint. With `resume` it goes on with the run in `out` from its last
    checkpoint (where there is none, from the beginning), by the recipe that lies there: what `recipe` states
    must agree with it. A run that is done is left as it is.

    Raises:
        UserError: a recipe, source or folder that cannot be used, and nothing is left in a new `out` then;
            or a loss that was not finite at half of the rate either.
        Stopped: a signal came.
    """
    processes.join()
    if not resume:
        recipe = adopt_model(recipe)
        check(recipe)
    stop = StopRequest(str(out))
    with _opened(out, listener, resume) as run, stop.handled():
        if resume:
            return _resume(run, recipe, stop)
        try:
            if processes.is_first():
                write_text(run.recipe, recipe.to_yaml())  # what resumes, if it is killed before it has begun
            job = _prepare(run, recipe)
            model = _build(run, job)
        except UserError:
            run.discard()
            raise
        return _finish(run, job, model, None, stop)


@contextlib.contextmanager
def _opened(out: str | Path, listener: Listener | None, resume: bool) -> Iterator[RunFolder]:
    """The run folder, which the first process makes, or finds, and holds."""
    with contextlib.ExitStack() as held:

        def take() -> Path:
            run = (RunFolder.open if resume else RunFolder.create)(out, listener)
            held.enter_context(run.locked())
            return run.path

        path = processes.from_first(take)
        yield RunFolder(path, listener) if processes.is_first() else FollowedRun(path)


def _resume(run: RunFolder, stated: Recipe, stop: StopRequest) -> RunFolder:
    recipe = load_recipe(run.recipe)
    adopt_unchanged(recipe, stated)

    def look() -> tuple[bool, bool, Checkpoint | None]:
        run.end_log_line()
        begin = newest_checkpoint(run.checkpoints, lambda message: run.log("note", message=message))
        if begin is not None:
            refuse_code(begin.path)
        return run.evaluation.is_file(), run.model.is_dir(), begin

    is_done, has_model, begin = processes.from_first(look)
    if is_done:
        run.tell("note", message="this run is done and left as it is; train --from goes on from its model")
        return run
    if begin is None and not has_model:
        if processes.is_first():
            run.samples.unlink(missing_ok=True)
            shutil.rmtree(run.milestones, ignore_errors=True)
        job = _prepare(run, recipe)
        return _finish(run, job, _build(run, job), None, stop)
    check(recipe)
    try:
        corpus = _read(run, recipe, is_resuming=True)
    except NoSource as error:
        raise UserError(
            f"{error.word!r}, of which this run reads, is not there: bring it back, or start a new run"
        ) from error
    budget = budget_of(recipe.training, tokens_of_a_step(recipe.training))
    private = None
    if recipe.privacy.epsilon is not None and begin is not None:
        private = PrivateState.load(begin.path, begin.progress.steps)
    job = _job_of(run, recipe, corpus, budget, private)
    if has_model:
        with tracking(run, recipe, is_resuming=True):
            return _measure(run, job)
    return _finish(run, job, _build(run, job, is_new=False), begin, stop)


def check(recipe: Recipe) -> None:
    """What can be wrong with a recipe by itself, before anything is read.

    Raises:
        UserError: that.
    """
    recipe = resolve(recipe)
    adopt_dimension(recipe)
    build_config(recipe, mixer_types_of(recipe))
    check_optimizer(recipe.training.optimizer)
    check_compiler(recipe.training.torch_compile_backend)
    check_trackers(recipe.training.report_to)
    read_milestones(recipe.training.milestone_words)
    if recipe.corpus.stream and recipe.training.carry_state:
        raise UserError(
            "training.carry_state = true needs all rows at hand, and --stream has none of them: leave one out"
        )
    check_languages(recipe.corpus)
    check_canaries(recipe.privacy, recipe.corpus)
    check_scrubbing(recipe.corpus)
    check_near_duplicates(recipe.corpus)
    if recipe.corpus.temperature != 1 and recipe.training.carry_state:
        raise UserError(
            "training.carry_state = true reads the text in its order, and corpus.temperature = "
            f"{recipe.corpus.temperature:g} parts of it again and again: leave one out"
        )
    _check_sharding(recipe)
    if recipe.privacy.epsilon is not None:
        check_private(recipe)
    processes.rows_of_each(recipe.training.batch_size, recipe.training.gradient_accumulation_steps)
    budget_of(recipe.training, tokens_of_a_step(recipe.training))


def _check_sharding(recipe: Recipe) -> None:
    """
    Raises:
        UserError: something that needs whole matrices, where each process holds a part of them.
    """
    stated = {
        "training.optimizer=muon": (recipe.training.optimizer == "muon", "training.optimizer=adamw"),
        "vectors.frozen=true": (recipe.vectors.frozen, "vectors.frozen=false"),
    }
    for name, (is_so, remedy) in stated.items():
        if is_so and processes.is_sharded():
            raise UserError(
                f"{name} needs whole matrices, and FSDP and DeepSpeed leave each process a part of them: "
                f"train by data parallelism alone (--processes), or --set {remedy}"
            )


def _prepare(run: RunFolder, given: Recipe) -> Job:
    """Read and encode the corpus, plan a run by the clock, and write the recipe as it was settled."""
    recipe = resolve(given)
    adopt_dimension(recipe)
    base = None if given.model.init_from is None else hub_id_of(given.model.init_from)
    run.log("started", decoder=recipe.model.decoder, mixers=mixer_types_of(recipe), base_model=base)
    processes.share_threads(recipe.training.num_threads)
    corpus = _read(run, recipe)
    budget = budget_of(recipe.training, tokens_of_a_step(recipe.training))
    n_tokens = tokens_to_plan_by(recipe, corpus)
    if budget.seconds is not None:
        device = training_arguments_of(run, recipe.training, budget).device

        def plan(budget: Budget = budget) -> tuple[Recipe, Budget]:
            return plan_recipe(run, given, corpus.tokenizer, n_tokens, budget, device), budget

        recipe, budget = processes.from_first(plan)
    else:
        settle_decay(recipe, budget.steps, n_tokens)
    corpus.tokenizer.model_max_length = recipe.training.max_seq_length
    private = None if recipe.privacy.epsilon is None else begin_private(run, recipe, corpus, budget)
    job = _job_of(run, recipe, corpus, budget, private)
    if processes.is_first():
        with atomic_folder(run.tokenizer, replace=True) as folder:  # its model_max_length is known now
            corpus.tokenizer.save_pretrained(folder)
        write_text(run.recipe, recipe.to_yaml())
        machine = {"device": _describe(job.arguments.device), "processes": processes.count()}
        write_json(run.environment, {**describe_environment(), **machine}, EnvironmentFile)
    return job


def _read(run: RunFolder, recipe: Recipe, is_resuming: bool = False) -> TokenizedCorpus | StreamedCorpus:
    return (prepare_stream if recipe.corpus.stream else prepare_corpus)(run, recipe, is_resuming)


def _job_of(
    run: RunFolder,
    recipe: Recipe,
    corpus: TokenizedCorpus | StreamedCorpus,
    budget: Budget,
    private: PrivateState | None = None,
) -> Job:
    processes.share_threads(recipe.training.num_threads)
    training = recipe.training
    rows: Rows
    if recipe.privacy.epsilon is not None:
        assert isinstance(corpus, TokenizedCorpus)
        training, rows = steps_of(recipe), corpus.windows(training)
    else:
        rows = corpus.rows(training)
    arguments = training_arguments_of(run, training, budget)
    carried = StateCallback(arguments, rows.n_rows) if recipe.training.carry_state else None
    words = None
    if recipe.training.milestone_words:
        words = processes.from_first(lambda: corpus.word_rate(rows))
    return Job(rows, corpus, recipe, budget, arguments, carried, words, private=private)


def _build(run: RunFolder, job: Job, is_new: bool = True) -> GenLMForCausalLM:
    """The model before the first step; not `is_new`: before the weights of a checkpoint are put into it."""
    recipe = job.recipe
    config = build_config(recipe, mixer_types_of(recipe))
    adopt_vocabulary(config, job.corpus.tokenizer)
    set_seed(recipe.training.seed)
    model = GenLMForCausalLM(config)
    job.frozen_rows = processes.from_first(lambda: _start(run, model, job, is_new))
    processes.share_weights(model)
    n_rows, max_seq_length = job.rows.n_rows, recipe.training.max_seq_length
    run.log("model", parameters=model.num_parameters(), rows=n_rows, max_seq_length=max_seq_length)
    return model


def _start(run: RunFolder, model: GenLMForCausalLM, job: Job, is_new: bool) -> torch.Tensor | None:
    """Give `model` the start that the recipe names; returns the tokens (V,) whose vectors are to stay."""
    recipe, corpus = job.recipe, job.corpus
    held = None
    if recipe.model.init_from is not None and is_new:
        load_weights(model, recipe.model.init_from)
    if recipe.vectors.path is not None:
        ids = corpus.known_ids(job.rows)
        found = start_from_vectors(run, model, corpus.tokenizer, corpus.words, ids, recipe)
        held = torch.from_numpy(found) if recipe.vectors.frozen else None
    if recipe.training.init == "bigrams" and is_new:
        assert not isinstance(job.rows, DocumentWindows), "nothing starts from statistics of a private text"
        tokens = job.rows.first_tokens(MAX_COUNTED_TOKENS)
        bigrams = init_from_bigrams(model, tokens, keep_embedding=recipe.vectors.path is not None)
        run.log("bigrams", tokens=bigrams.n_tokens, distinct=bigrams.n_bigrams)
    return held


def _finish(
    run: RunFolder, job: Job, model: GenLMForCausalLM, begin: Checkpoint | None, stop: StopRequest
) -> RunFolder:
    """Train, save and measure."""
    with tracking(run, job.recipe, is_resuming=begin is not None):
        if begin is not None:
            run.log("resumed", step=begin.progress.step)
        trained = _fit(run, job, model, begin, stop)
        if trained is not None and job.private is not None:
            write_guarantee(run, job.private, job.recipe)
        if trained is not None:
            save(run, trained, job.corpus.tokenizer)
        return _measure(run, job)


def _fit(
    run: RunFolder, job: Job, model: GenLMForCausalLM, begin: Checkpoint | None, stop: StopRequest
) -> GenLMForCausalLM | None:
    """As `fit`, once more at half of the rate where the loss leaves the numbers."""
    try:
        return fit(run, model, job, begin, stop)
    except Diverged as error:
        if job.private is not None:
            raise diverged_in_private(error.step, job.recipe) from error
        back = processes.from_first(lambda: newest_checkpoint(run.checkpoints))
        step = 0 if back is None else back.progress.step
        rate = job.recipe.training.learning_rate
        if back is not None and back.progress.is_rate_halved:
            raise _diverged_twice(error.step, rate) from error
        run.log("diverged", step=error.step, back_to=step, learning_rate=rate / 2)
        job.budget.spent_s = job.budget.elapsed_s
        model = _build(run, job, is_new=back is None)
        try:
            return fit(run, model, job, back, stop, lr_scale=0.5)
        except Diverged as again:
            raise _diverged_twice(again.step, rate) from again


def _diverged_twice(step: int, rate: float) -> UserError:
    return UserError(
        f"the loss became NaN or infinite at step {step}, also at half the learning rate: start a new run "
        f"with a training.learning_rate well below {rate:g}"
    )


def _measure(run: RunFolder, job: Job) -> RunFolder:
    if processes.is_first():
        evaluate_run(run, job.corpus, job.recipe)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # nothing is to be resumed
    return run


def save(run: RunFolder, model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model/: weights, config, tokenizer and the code that loads them without this package.

    Raises:
        UserError: no space; there is no model/ then, and the checkpoints stay.
    """
    failure = write_model(model, tokenizer, run.model)
    if failure is not None:
        raise UserError(
            f"the model cannot be written to {str(run.model)!r} ({failure}): make room, then go on with "
            f"hf-genlm train --resume --out {shlex.quote(str(run.path))}"
        )
    run.log("saved", bytes=sum(file.stat().st_size for file in run.model.iterdir()))


def evaluate_run(
    run: RunFolder, corpus: TokenizedCorpus | StreamedCorpus, recipe: Recipe
) -> list[Measurement]:
    """Measure the model as it lies on disk, on the whole validation split; writes evaluation.json, and the
    sums by block of the text beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GenLMForCausalLM.from_pretrained(run.model).to(device)

    def on_progress(done: int, total: int) -> None:
        run.tell("progress", task="evaluation", done=done, total=total)

    blocks = BlockSums.from_documents(corpus.validation)
    found = likelihood_of(model, corpus, recipe, on_progress=on_progress, on_scores=blocks.add)
    blocks.save(run.blocks)
    found += measure_languages(
        model,
        corpus.tokenizer,
        found,
        corpus.languages,
        recipe,
        start_id=corpus.tokenizer.bos_token_id,
        context=recipe.evaluation.context_length or recipe.training.max_seq_length,
        on_progress=on_progress,
    )
    write_measurements(run.evaluation, found)
    run.log("evaluated", measurements=[m.to_json() for m in found])
    return found


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
