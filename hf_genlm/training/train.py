"""The main job: from sources to a measured model in a run folder. Run it with `hf-genlm train [SOURCE
...]`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_genlm.errors import UserError, did_you_mean
from hf_genlm.evaluation.likelihood import measure_likelihood
from hf_genlm.evaluation.measurement import Measurement, write_measurements
from hf_genlm.memory import keeping_memory
from hf_genlm.model import GenLMForCausalLM
from hf_genlm.recipe import Recipe, TrainingRecipe
from hf_genlm.run_folder import Listener, RunFolder, describe_environment, write_json, write_text
from hf_genlm.text.cache import Cache, cache_folder
from hf_genlm.text.corpus import Corpus, read_corpus
from hf_genlm.text.encoding import TokenizedDocuments, encode_documents
from hf_genlm.text.packing import PackedRows, collate
from hf_genlm.text.tokenizer import load_tokenizer, train_tokenizer
from hf_genlm.training.budget import Budget, budget_of, resolve, trapezoid
from hf_genlm.training.callbacks import (
    BudgetCallback,
    HoldRowsCallback,
    LogCallback,
    MilestoneCallback,
    Pace,
    ThreadsCallback,
    write_samples,
)
from hf_genlm.training.configure import (
    adopt_vocabulary,
    build_config,
    mixer_types_of,
    plan_recipe,
    settle_decay,
)
from hf_genlm.training.optimizer import OptimizerFactory, check_optimizer
from hf_genlm.training.pair_start import MOST_TOKENS, start_from_pairs
from hf_genlm.training.plan import tokens_of_a_step
from hf_genlm.training.word_vectors import adopt_dimension, count_words, start_from_vectors

_PARTIAL_VALIDATION_TOKENS = 16_384
_SAMPLE_TOKENS = 64
_VALIDATIONS = 4
_SHORT_S = 29.0  # planning has taken its part of half a minute


@dataclasses.dataclass
class TokenizedCorpus:
    """Both splits as token ids, with the tokenizer that made them.

    `words` counts those of the training text, for word vectors alone: otherwise it is empty.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenizedDocuments
    validation: TokenizedDocuments
    words: dict[str, int]


@contextlib.contextmanager
def _keeping_threads() -> Iterator[None]:
    """A run may take fewer of torch's threads; the process that called for it has its own again then."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_keeping_threads()
def train(recipe: Recipe, out: str | Path, listener: Listener | None = None) -> RunFolder:
    """Read the corpus, train tokenizer and model, measure the saved model, and leave all of it in `out`.

    `listener(event, fields)` hears every logged event, and `progress` {task, done, total} within a stage.

    Raises:
        UserError: a recipe, source or folder that cannot be used; nothing is left in `out` then.
    """
    given, recipe = recipe, resolve(recipe)
    adopt_dimension(recipe)
    config = build_config(recipe, mixer_types_of(recipe))
    check_optimizer(recipe.training.optimizer)
    _check_compiler(recipe.training.compile)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    budget = budget_of(recipe.training, tokens_of_a_step(recipe.training))
    run = RunFolder.create(out, listener)
    try:
        run.log("started", decoder=recipe.model.decoder, mixers=config.mixer_types)
        corpus = prepare_corpus(run, recipe)
        training_arguments = _training_arguments(run, recipe.training, budget)
        if budget.seconds is not None:
            n_tokens = corpus.train.n_tokens
            recipe = plan_recipe(run, given, corpus.tokenizer, n_tokens, budget, training_arguments.device)
            config = build_config(recipe, mixer_types_of(recipe))
            training_arguments = _training_arguments(run, recipe.training, budget)
        else:
            settle_decay(recipe, budget.steps, corpus.train.n_tokens)
        corpus.tokenizer.model_max_length = recipe.training.row_length
        corpus.tokenizer.save_pretrained(run.tokenizer)  # again: its model_max_length is known now
        rows = PackedRows(
            corpus.train,
            row_length=recipe.training.row_length,
            eos_id=corpus.tokenizer.eos_token_id,
            pad_id=corpus.tokenizer.pad_token_id,
        )
        adopt_vocabulary(config, corpus.tokenizer)
        set_seed(recipe.training.seed)
        model = GenLMForCausalLM(config)
        held = None
        if recipe.vectors.path is not None:
            found = start_from_vectors(run, model, corpus.tokenizer, corpus.words, corpus.train.ids, recipe)
            held = torch.from_numpy(found) if recipe.vectors.frozen else None
        if recipe.training.start == "pairs":
            learned = start_from_pairs(
                model, rows.first_tokens(MOST_TOKENS), keep_embedding=recipe.vectors.path is not None
            )
            run.log("pairs", tokens=learned.n_tokens, distinct=learned.n_pairs)
    except UserError:
        run.discard()
        raise
    write_text(run.recipe, recipe.to_yaml())
    write_json(run.environment, {**describe_environment(), "device": _describe(training_arguments.device)})
    run.log("model", parameters=model.num_parameters(), rows=len(rows), row_length=recipe.training.row_length)
    fit(run, model, rows, corpus, recipe, budget, training_arguments, held)
    save(run, model, corpus.tokenizer)
    evaluate_run(run, corpus, recipe)
    return run


def prepare_corpus(run: RunFolder, recipe: Recipe) -> TokenizedCorpus:
    """Read, split and tokenize the corpus; writes corpus.json and tokenizer/."""

    def note(message: str) -> None:
        run.log("note", message=message)

    cache = Cache(cache_folder() if recipe.corpus.cache else None, note)
    corpus = read_corpus(recipe.corpus)
    run.log("corpus", **{name: corpus.report[name] for name in ("description", "train", "validation")})
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


def fit(
    run: RunFolder,
    model: GenLMForCausalLM,
    rows: PackedRows,
    corpus: TokenizedCorpus,
    recipe: Recipe,
    budget: Budget,
    arguments: TrainingArguments,
    held: torch.Tensor | None = None,
) -> None:
    """Train `model` in place; the rows `held` (V,) of its embedding as the vectors section says."""
    training = recipe.training
    pace = Pace(len(rows), training.batch_size * training.accumulation, training.row_length - 1)

    def sample(model: GenLMForCausalLM, step: int) -> None:
        if training.samples == 0:
            return
        texts = write_samples(model, corpus.tokenizer, training.samples, _SAMPLE_TOKENS, training.seed)
        for text in texts:
            run.log("sample", step=step, prompt="", text=text)
        with run.samples.open("a", encoding="utf-8") as file:
            file.write(_samples_markdown(step, texts))

    def look(model: GenLMForCausalLM, step: int) -> None:
        found = _likelihood(model, corpus, recipe, _PARTIAL_VALIDATION_TOKENS)
        values = {m.name: round(m.value, 5) for m in found}
        run.log("validation", step=step, partial=True, tokens=found[0].n, **values)
        sample(model, step)

    watching = [ThreadsCallback(run, budget.step_s)] if budget.step_s is not None else []
    holding = [HoldRowsCallback(held, recipe.vectors.release_step)] if held is not None else []
    trainer = BudgetTrainer(
        budget=budget,
        recipe=training,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"recipe": training}),
        callbacks=[
            BudgetCallback(budget),
            LogCallback(run, budget, pace),
            MilestoneCallback(budget, _validations(training, budget), look),
            *watching,
            *holding,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with keeping_memory():
        trainer.train()
    step, seconds = trainer.state.global_step, budget.elapsed_s
    model.config.use_cache = True  # Trainer turned it off for training
    sample(model, step)
    run.log(
        "trained",
        steps=step,
        tokens=pace.tokens(step),
        epochs=round(step / pace.steps_per_epoch, 3),
        seconds=round(seconds, 2),
        tokens_per_s=round(pace.tokens(step) / seconds),
    )


class BudgetTrainer(Trainer):
    """Trainer with the learning rate tied to the budget: it reaches 0 when the time or the steps are up."""

    def __init__(self, budget: Budget, recipe: TrainingRecipe, **kwargs: Any):
        self.budget, self.recipe = budget, recipe
        super().__init__(**kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        def share(step: int) -> float:
            progress = self.budget.progress(step + 0.5)
            return trapezoid(progress, self.recipe.warmup_fraction, self.recipe.decay_fraction)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss without logits, which nothing here reads, and with the recipe's own terms."""
        terms = {"label_smoothing": self.recipe.label_smoothing, "z_loss": self.recipe.z_loss}
        return super().compute_loss(model, {**inputs, "skip_logits": True, **terms}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: transformers' estimate walks all parameters at every step and is wrong for tied heads."""
        return 0


def _validations(training: TrainingRecipe, budget: Budget) -> int:
    """How many there are: a run of seconds has no time for them."""
    if training.validations is not None:
        return training.validations
    is_short = budget.seconds is not None and budget.seconds < _SHORT_S
    return 0 if is_short else _VALIDATIONS


def save(run: RunFolder, model: GenLMForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write model/: weights, config, tokenizer and the code that loads them without this package."""
    model.save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    run.log("saved", bytes=sum(file.stat().st_size for file in run.model.iterdir()))


def evaluate_run(run: RunFolder, corpus: TokenizedCorpus, recipe: Recipe) -> list[Measurement]:
    """Measure the model as it lies on disk, on the whole validation split; writes evaluation.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GenLMForCausalLM.from_pretrained(run.model).to(device)

    def on_progress(done: int, total: int) -> None:
        run.tell("progress", task="evaluation", done=done, total=total)

    found = _likelihood(model, corpus, recipe, on_progress=on_progress)
    write_measurements(run.evaluation, found)
    run.log("evaluated", measurements=[m.to_json() for m in found])
    return found


def _likelihood(
    model: GenLMForCausalLM,
    corpus: TokenizedCorpus,
    recipe: Recipe,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    return measure_likelihood(
        model,
        corpus.validation,
        start_id=corpus.tokenizer.bos_token_id,
        context=recipe.evaluation.context,
        stride=recipe.evaluation.stride,
        batch_size=recipe.evaluation.batch_size,
        max_tokens=max_tokens,
        on_progress=on_progress,
    )


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


def _training_arguments(run: RunFolder, training: TrainingRecipe, budget: Budget) -> TrainingArguments:
    use_bf16 = {"auto": computes_bfloat16(), "bfloat16": True, "float32": False}.get(training.dtype)
    if use_bf16 is None:
        raise UserError(f"unknown training.dtype {training.dtype!r}; known: auto, bfloat16, float32")
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=budget.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=use_bf16,
        torch_compile_backend=training.compile,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs in one process would train by nn.DataParallel, slowly and inexactly: "
            "set CUDA_VISIBLE_DEVICES=0, or start `accelerate launch -m hf_genlm train`"
        )
    return arguments


def _check_compiler(backend: str | None) -> None:
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise UserError(f"unknown training.compile {backend!r}{did_you_mean(backend, known)}")


def computes_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 natively; emulated on a CPU it can be 100 times slower."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _samples_markdown(step: int, texts: list[str]) -> str:
    """Each text in a fence longer than any run of backticks in it."""
    parts = [f"## After step {step}\n"]
    for text in texts:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{fence}text\n{text}\n{fence}\n")
    return "\n".join(parts) + "\n"
