"""Train: read the corpus, tokenize, settle, build, fit, evaluate. The service behind `hf-genlm train`.

1. check    every rule that the recipe can break, before any text is read (check.py)
2. read     documents, canaries, tokenizer, token ids (corpus.py)
3. plan     with a time limit: measure steps, choose the size (plan.py)
4. settle   recipe and facts -> settings, the only decision (config/settle.py)
5. build    the model and its start: bigrams, word vectors, other weights (build.py)
6. fit      Trainer with our callbacks (fit.py, trainer.py, callbacks.py)
7. save     model/ in the run folder
8. evaluate the saved model on the validation text
"""

import contextlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from hf_genlm.config.recipe import PLACES, Recipe, load_recipe, pointing_to_places
from hf_genlm.config.settings import Facts, Settings
from hf_genlm.config.settle import settle, settle_reading
from hf_genlm.errors import UserError
from hf_genlm.evaluation.aggregation import BlockSums
from hf_genlm.evaluation.languages import measure_languages
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.files import read_json, sha256_of, use_private_compiler_caches, write_json, write_text
from hf_genlm.loading import hub_id_of
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.privacy.mechanism import choose_delta
from hf_genlm.run_folder import FollowedRun, Listener, RunFolder, describe_environment
from hf_genlm.run_schemas import EnvironmentFile, VectorsFile
from hf_genlm.training import processes
from hf_genlm.training.budget import Budget
from hf_genlm.training.build import new_model, start_model
from hf_genlm.training.callbacks import Diverged, ThreadsCallback
from hf_genlm.training.carried_state import StateCallback
from hf_genlm.training.check import check
from hf_genlm.training.checkpoints import Checkpoint, StopRequest, newest_checkpoint, write_model
from hf_genlm.training.corpus import (
    Rows,
    StreamedCorpus,
    TokenizedCorpus,
    prepare_corpus,
    prepare_stream,
    save_tokenizer,
)
from hf_genlm.training.counting import NgramCounts, count_corpus, measure_counts
from hf_genlm.training.fit import Job, fit, likelihood_of, sample
from hf_genlm.training.forecast import log_forecast
from hf_genlm.training.plan import choose_threads, plan_run
from hf_genlm.training.private import PrivateState, begin_private, trainer_settings, write_guarantee
from hf_genlm.training.trackers import tracking
from hf_genlm.training.trainer import computes_bfloat16, training_arguments_of

# fields that may change when a run is resumed: they decide nothing about the model, or name another place of
# the same files
_CHANGEABLE = {
    *PLACES,
    "corpus.cache",
    "training.save_minutes",
    "training.save_steps",
    "training.save_total_limit",
    "training.milestone_words",
    "training.logging_steps",
    "training.report_to",
}


def train(
    recipe: Recipe, out: str | Path, listener: Listener | None = None, resume: bool = False
) -> RunFolder:
    """Train a tokenizer and a model, measure the saved model, and leave everything in the run folder `out`.

    `listener(event, fields)` receives every logged event, and `progress` {task, done, total} within a stage.
    Ctrl-C and SIGTERM end a run with a checkpoint.

    With `corpus.stream`, the length of the text stays unknown: size and weight decay are chosen for one epoch
    at most, `training.max_epochs` ends nothing, and a stream that ends is read again.

    In a process group every process calls this. The first one alone writes and measures; the others return
    when it has the model.

    Args:
        resume: continue the run in `out` from its last checkpoint (without one, from the beginning) by the
            recipe in that folder, which `recipe` must agree with. A run that is done is left as it is.

    Raises:
        UserError: a recipe, source or folder that cannot be used, and a new `out` is removed; or a loss that
            became NaN or infinite, also at half the learning rate.
        Stopped: a signal came.
    """
    use_private_compiler_caches()
    processes.join()
    n_threads, stop = torch.get_num_threads(), StopRequest(str(out))
    try:
        if resume:
            with _opened(out, listener, resume) as run, stop.handled():
                return _resume(run, recipe, stop)
        facts = check(recipe)
        with _opened(out, listener, resume) as run, stop.handled():
            return _begin(run, recipe, facts, stop)
    finally:
        torch.set_num_threads(n_threads)  # a run can use fewer


@contextlib.contextmanager
def _opened(out: str | Path, listener: Listener | None, resume: bool) -> Iterator[RunFolder]:
    """The run folder, which the first process makes, or finds, and locks."""
    with contextlib.ExitStack() as stack:

        def open_and_lock() -> Path:
            run = (RunFolder.open if resume else RunFolder.create)(out, listener)
            stack.enter_context(run.locked())
            return run.path

        path = processes.from_first(open_and_lock)
        yield RunFolder(path, listener) if processes.is_first() else FollowedRun(path)


def _begin(run: RunFolder, recipe: Recipe, facts: Facts, stop: StopRequest) -> RunFolder:
    """A new run."""
    try:
        if processes.is_first():
            write_text(
                run.recipe, recipe.to_yaml()
            )  # for resuming, if the run is killed before it is settled
        job = _prepare(run, recipe, facts)
        model = _build(run, job)
    except UserError:
        run.discard()
        raise
    return _finish(run, job, model, None, stop)


def _prepare(run: RunFolder, recipe: Recipe, facts: Facts) -> Job:
    """Read the corpus, plan, and settle; write the settled recipe."""
    first = settle(recipe, facts)  # sizes that the time decides are assumed here
    base = None if recipe.model.init_from is None else hub_id_of(recipe.model.init_from)
    run.log("started", decoder=first.model.decoder, mixers=first.model.mixers, base_model=base)
    if recipe.training.dtype == "bfloat16" and not computes_bfloat16():
        message = "training.dtype=bfloat16 can be 100 times slower here than float32, which auto would choose"
        run.log("note", message=message)
    processes.set_threads(recipe.training.num_threads)
    corpus = _read(run, recipe, facts)
    facts = _with_corpus(facts, recipe, corpus)
    facts, counts = _count(run, corpus, first, facts)
    is_planned = first.length.seconds is not None and not first.architecture.is_ngram
    if is_planned:
        run.tell("progress", task="planning", done=0, total=None)
        device = training_arguments_of(run, first.training, Budget(), first.model.hidden_size).device
        planning = facts  # of the loop below, which each process runs
        facts = processes.from_first(
            lambda: plan_run(
                recipe, planning, lambda s: new_model(s, corpus.tokenizer, device, counts), device
            )
        )
    settings = settle(recipe, facts)
    if is_planned:
        _log_plan(run, settings, facts)
    private = None
    if facts.private_documents is not None:
        private = begin_private(run, settings, facts.private_documents)
    job = _job_of(run, settings, corpus, private)
    job = replace(job, counts=counts, leave_one_out=facts.leave_one_out)
    if processes.is_first():
        corpus.tokenizer.model_max_length = settings.training.max_seq_length
        save_tokenizer(run, corpus.tokenizer)
        write_text(run.recipe, settings.to_recipe().to_yaml())
        device = job.arguments.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        machine = {"device": name, "processes": processes.count()}
        write_json(run.environment, {**describe_environment(), **machine}, EnvironmentFile)
    return job


def _count(
    run: RunFolder, corpus: TokenizedCorpus | StreamedCorpus, settings: Settings, facts: Facts
) -> tuple[Facts, NgramCounts | None]:
    """The counts that the model is to hold, in the first process, and their sizes."""
    if not settings.architecture.holds_counts or settings.model.init_from is not None:
        return facts, None
    found: list[NgramCounts] = []

    def count() -> tuple[list[int], bool]:
        found.append(count_corpus(run, corpus, settings))
        return found[0].sizes, found[0].leave_one_out

    sizes, leave_one_out = processes.from_first(count)
    facts = replace(facts, ngram_sizes=tuple(sizes), leave_one_out=leave_one_out)
    return facts, found[0] if found else None


def _read(
    run: RunFolder, recipe: Recipe, facts: Facts, is_resuming: bool = False
) -> TokenizedCorpus | StreamedCorpus:
    reading = settle_reading(recipe, facts)
    return (prepare_stream if recipe.corpus.stream else prepare_corpus)(run, reading, is_resuming)


def _with_corpus(facts: Facts, recipe: Recipe, corpus: TokenizedCorpus | StreamedCorpus) -> Facts:
    """`facts` with those of the corpus."""
    facts = replace(
        facts, vocab_size=len(corpus.tokenizer), train_tokens=corpus.n_tokens, train_targets=corpus.n_targets
    )
    if recipe.privacy.epsilon is None:
        return facts
    assert isinstance(corpus, TokenizedCorpus), "check() refuses streams"
    n_documents = len(corpus.train)
    return replace(facts, private_documents=n_documents, delta=choose_delta(recipe.privacy, n_documents))


def _log_plan(run: RunFolder, settings: Settings, facts: Facts) -> None:
    training, length = settings.training, settings.length
    assert length.step_s is not None
    if length.expected_steps == length.max_steps and facts.private_documents is None:
        seconds = max(1, length.expected_steps * length.step_s)
        message = (
            f"this run ends early, after about {seconds:.0f} s: the model would overfit so small a text, "
            f"which is read {training.max_epochs:g} times at most (training.max_epochs)"
        )
        run.log("note", message=message)
    run.log(
        "planned",
        hidden_size=settings.model.hidden_size,
        num_hidden_layers=settings.model.num_hidden_layers,
        max_seq_length=training.max_seq_length,
        batch_size=training.batch_size,
        threads=facts.num_threads or torch.get_num_threads(),
        step_s=round(length.step_s, 5),
        tokens=length.pace.tokens(length.expected_steps),
        passes=None if length.epochs is None else round(length.epochs, 2),
        weight_decay=training.weight_decay,
        seconds=round(facts.planning_s, 3),
    )


def _job_of(
    run: RunFolder, settings: Settings, corpus: TokenizedCorpus | StreamedCorpus, private: PrivateState | None
) -> Job:
    training, length, width = settings.training, settings.length, settings.architecture.hidden_size
    processes.set_threads(training.num_threads)
    budget = Budget(length.max_steps, length.seconds)
    rows: Rows
    if settings.privacy.epsilon is not None:
        assert isinstance(corpus, TokenizedCorpus), "check() refuses streams"
        rows = corpus.windows(training)
        return Job(
            rows, corpus, settings, budget,
            training_arguments_of(run, trainer_settings(training), budget, width),
            private=None if private is None else private.bound_to(rows, settings),
        )  # fmt: skip
    rows = corpus.rows(training)
    arguments = training_arguments_of(run, training, budget, width)
    carried = words = None
    if training.carry_state:
        assert rows.n_rows is not None, "check() refuses streams"
        carried = StateCallback(arguments, rows.n_rows)
    if training.milestone_words:
        words = processes.from_first(lambda: corpus.word_rate(rows))  # type: ignore[arg-type]
    return Job(rows, corpus, settings, budget, arguments, carried, words)


def _resume(run: RunFolder, stated: Recipe, stop: StopRequest) -> RunFolder:
    begun = load_recipe(run.recipe)
    recipe = _resumed_recipe(begun, stated)
    for name in ("sources", "validation"):  # texts that were given in Python, in a folder that was moved
        words, given = getattr(recipe.corpus, name), run.path / f"{name}.jsonl"
        if [Path(word).name for word in words] == [given.name] and given.is_file():
            setattr(recipe.corpus, name, [str(given)])

    def look_around() -> tuple[bool, bool, Checkpoint | None]:
        run.end_log_line()
        begin = newest_checkpoint(run.checkpoints, lambda message: run.log("note", message=message))
        return run.evaluation.is_file(), run.model.is_dir(), begin

    is_done, has_model, begin = processes.from_first(look_around)
    if is_done:
        run.tell("note", message="this run is done and left as it is; train --from continues from its model")
        return run
    with pointing_to_places(recipe):
        facts = check(recipe)
    if begin is None and not has_model:
        if processes.is_first():
            run.samples.unlink(missing_ok=True)
            shutil.rmtree(run.milestones, ignore_errors=True)
        with pointing_to_places(recipe):
            job = _prepare(run, recipe, facts)
        return _finish(run, job, _build(run, job), None, stop)
    with pointing_to_places(recipe):
        corpus = _read(run, recipe, facts, is_resuming=True)
    if any(attrgetter(name)(recipe) != attrgetter(name)(begun) for name in PLACES):
        processes.from_first(lambda: _write_places(run, recipe))
    facts = _with_corpus(facts, recipe, corpus)
    counts = None
    if not has_model:
        facts, counts = _count(run, corpus, settle(recipe, facts), facts)
    settings = settle(recipe, facts)
    private = None
    if settings.privacy.epsilon is not None and begin is not None:
        private = PrivateState.load(begin.path, begin.progress.steps)
    job = _job_of(run, settings, corpus, private)
    job = replace(job, counts=counts, leave_one_out=facts.leave_one_out)
    if has_model:
        with tracking(run, settings.to_recipe(), is_resuming=True):
            return _evaluate(run, job)
    return _finish(run, job, _build(run, job, is_new=False), begin, stop)


def _write_places(run: RunFolder, recipe: Recipe) -> None:
    """Write recipe.yaml with the places that its files have now, for those who read them later.

    Raises:
        UserError: the word vectors are not those that the run began with.
    """
    path = Path(recipe.vectors.path or "").expanduser()
    is_compared = path.is_file() and run.vectors.is_file()
    if is_compared and sha256_of(path) != read_json(run.vectors, VectorsFile)["sha256"]:
        raise UserError(f"{str(path)!r} holds other word vectors than this run began with: name those")
    write_text(run.recipe, recipe.to_yaml())


def _resumed_recipe(begun: Recipe, stated: Recipe) -> Recipe:
    """The recipe that the run began with, with the changes that `stated` may make.

    Raises:
        UserError: `stated` differs in another field.
    """
    recipe, default = begun.model_copy(deep=True), Recipe()
    for section in Recipe.model_fields:
        for key, was in getattr(begun, section):
            name, now = f"{section}.{key}", getattr(getattr(stated, section), key)
            if now in (was, getattr(getattr(default, section), key)):
                continue
            if name not in _CHANGEABLE:
                began = "" if was is None else f" ({was!r})"
                is_end = key in ("minutes", "steps", "tokens")
                longer = "; --from continues from the model of a run that is done" if is_end else ""
                raise UserError(
                    f"{name} = {now!r} is not what this run began with{began}: resume it without that, or "
                    f"start a new run{longer}"
                )
            setattr(getattr(recipe, section), key, now)
    return recipe


def _build(run: RunFolder, job: Job, is_new: bool = True) -> GenLMForCausalLM:
    """The model before the first step; not `is_new`: before a checkpoint is loaded into it."""
    settings = job.settings
    is_network = not settings.architecture.is_ngram
    if is_network and job.threads is None and job.arguments.device.type == "cpu":
        is_stated = settings.training.num_threads is not None
        job.threads = ThreadsCallback(run, torch.get_num_threads(), is_stated)
        run.tell("progress", task="measuring threads", done=0, total=None)
        torch.set_num_threads(choose_threads(lambda: new_model(settings, job.corpus.tokenizer), settings))
    set_seed(settings.training.seed)
    model = new_model(settings, job.corpus.tokenizer, counts=job.counts)
    if not is_network:
        run.log("model", parameters=model.num_parameters(), rows=None, max_seq_length=None)
        return model
    job.frozen_rows = processes.from_first(
        lambda: start_model(run, model, settings, job.corpus, job.rows, is_new)
    )
    processes.broadcast_weights(model)
    n_rows, max_seq_length = job.rows.n_rows, settings.training.max_seq_length
    tables = [] if model.mixture is None else model.mixture.ngrams.parameters()
    of_counts = sum(table.numel() for table in tables) or None
    run.log(
        "model",
        parameters=model.num_parameters(),
        rows=n_rows,
        max_seq_length=max_seq_length,
        of_counts=of_counts,
    )
    return model


def _finish(
    run: RunFolder, job: Job, model: GenLMForCausalLM, begin: Checkpoint | None, stop: StopRequest
) -> RunFolder:
    """Fit, save and evaluate."""
    with tracking(run, job.settings.to_recipe(), is_resuming=begin is not None):
        if begin is not None:
            run.log("resumed", step=begin.progress.step)
        if begin is None and job.settings.length.seconds is not None and processes.is_first():
            _forecast(run, job, job.settings.length.seconds)
        with stop.deferred():  # until the weights are saved
            is_network = not job.settings.architecture.is_ngram
            trained = _fit(run, job, model, begin, stop) if is_network else _fit_counts(run, job, model)
            if trained is not None and job.private is not None:
                write_guarantee(run, job.private, job.settings, job.arguments.device.type)
            if trained is not None:
                save(run, trained, job.corpus.tokenizer)
        return _evaluate(run, job)


def _fit(
    run: RunFolder, job: Job, model: GenLMForCausalLM, begin: Checkpoint | None, stop: StopRequest
) -> GenLMForCausalLM | None:
    """Fit; where the loss becomes NaN or infinite, once more from the last checkpoint at half of the rate."""
    rate = job.settings.training.learning_rate
    remedy = f"start a new run with a training.learning_rate well below {rate:g}"
    try:
        return fit(run, model, job, begin, stop)
    except Diverged as error:
        message = f"the loss became NaN or infinite at step {error.step}"
        if job.private is not None:  # going back would use the noise of its steps twice
            raise UserError(f"{message}, and a private run does not go back: {remedy}") from error
        back = processes.from_first(lambda: newest_checkpoint(run.checkpoints))
        if back is not None and back.progress.is_rate_halved:
            raise UserError(f"{message}, also at half the learning rate: {remedy}") from error
        step = 0 if back is None else back.progress.step
        run.log("diverged", step=error.step, back_to=step, learning_rate=rate / 2)
        job.budget.spent_s = job.budget.elapsed_s
        model = _build(run, job, is_new=back is None)
        try:
            return fit(run, model, job, back, stop, lr_scale=0.5)
        except Diverged as again:
            message = f"the loss became NaN or infinite at step {again.step}"
            raise UserError(f"{message}, also at half the learning rate: {remedy}") from again


def _fit_counts(run: RunFolder, job: Job, model: GenLMForCausalLM) -> GenLMForCausalLM:
    """`_fit` of a decoder of counts: they are in the model."""
    counts = job.counts
    assert counts is not None
    sample(run, job, model, 0)
    run.log(
        "trained",
        steps=0,
        tokens=counts.n_tokens,
        epochs=1.0,
        seconds=round(counts.seconds, 2),
        tokens_per_s=round(counts.n_tokens / counts.seconds),
    )
    return model


def save(run: RunFolder, model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write model/: weights, config, tokenizer and the code that loads them without this package.

    Raises:
        UserError: the disk is full; there is no model/ then, and the checkpoints stay.
    """
    failure = write_model(model, tokenizer, run.model)
    if failure is not None:
        raise UserError(
            f"the model cannot be written to {str(run.model)!r} ({failure}): make room, then continue with "
            f"hf-genlm train --resume --out {shlex.quote(str(run.path))}"
        )
    run.log("saved", bytes=sum(file.stat().st_size for file in run.model.iterdir()))


def _evaluate(run: RunFolder, job: Job) -> RunFolder:
    if processes.is_first():
        measured = evaluate_run(run, job.corpus, job.settings)
        trained = [event for event in run.read_log() if event["event"] == "trained"]
        _forecast(run, job, trained[-1]["seconds"] if trained else 0.0, measured)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # a run that is done is not resumed
    return run


def _forecast(run: RunFolder, job: Job, seconds: float, measured: Sequence[Measurement] = ()) -> None:
    """Measure what counts reach, if that is not done, and log what the run, or more time, will reach."""
    is_public = job.settings.privacy.epsilon is None  # counts of a private text are not covered
    if job.settings.architecture.is_ngram or not is_public:
        return
    events = run.read_log()
    if isinstance(job.corpus, TokenizedCorpus) and not any(event["event"] == "counts" for event in events):
        measure_counts(run, job.corpus, seconds)
    log_forecast(run, job.settings, measured)


def evaluate_run(
    run: RunFolder, corpus: TokenizedCorpus | StreamedCorpus, settings: Settings
) -> list[Measurement]:
    """Measure the saved model on the whole validation split; write evaluation.json, and the sums by block of
    the text beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GenLMForCausalLM.from_pretrained(run.model, use_safetensors=True)
    model.to(device)  # type: ignore[arg-type]

    def on_progress(done: int, total: int) -> None:
        run.tell("progress", task="evaluation", done=done, total=total)

    blocks = BlockSums.from_documents(corpus.validation)
    found = likelihood_of(model, corpus, settings, on_progress=on_progress, on_scores=blocks.add)
    blocks.save(run.blocks)
    found += measure_languages(
        model,
        corpus.tokenizer,
        found,
        corpus.languages,
        settings.to_recipe(),
        start_id=corpus.tokenizer.bos_token_id,
        context=settings.evaluation.context_length,
        on_progress=on_progress,
    )
    write_measurements(run.evaluation, found)
    run.log("evaluated", measurements=[m.to_json() for m in found])
    return found
