"""How the command line shows a run, the events on stderr, and the tables that verbs print."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_genlm.doctor import Installation, ModelCost, PartCost
    from hf_genlm.evaluation.measurement import Measurement

_COST_WIDTHS = (28, 14, 10, 15, 13, 19)


def table(measurements: Sequence["Measurement"]) -> str:
    """One line a measurement: name, value, standard error, 95 % interval, unit, count."""
    width = max([16, *(len(m.name) for m in measurements)])
    unit_width = max([12, *(len(m.unit) for m in measurements)])
    lines = []
    for m in measurements:
        error = f"± {m.stderr:.4f}" if m.stderr is not None else ""
        interval = "[{:.4f}, {:.4f}]".format(*m.interval) if m.interval is not None else ""
        figures = f"{m.value:>10.4f} {error:<10} {interval:<20}"
        lines.append(f"{m.name:<{width}} {figures} {m.unit:<{unit_width}} n = {m.n:,} ({m.split})")
    return "\n".join(lines)


def installation_lines(found: "Installation") -> list[str]:
    """One line a fact, the last one what `train` makes of them."""
    environment = found.environment
    facts = [(name, str(environment[name])) for name in ("python", "platform")]
    facts.append(("cpu cores", str(environment["cpu_count"])))
    facts += [(name, version or "not installed") for name, version in environment["packages"].items()]
    facts += [("device", device) for device in found.devices]
    facts.append(("bfloat16", "native" if found.is_bfloat16_native else "no GPU here computes it natively"))
    for extra in found.extras:
        state = f"missing {_first(extra.missing)}: {extra.command}" if extra.missing else "installed"
        facts.append((f"[{extra.name}]", f"{extra.purpose}: {state}"))
    facts.append(("train", f"on {found.training_device}, in {found.training_dtype} by training.dtype=auto"))
    if found.n_training_gpus > 1:
        n = found.n_training_gpus
        facts.append(("", f"with --processes {n} for all GPUs, or --processes 1 for the first of them"))
    return [f"{name:<14}{fact}" for name, fact in facts]


def model_cost_lines(cost: "ModelCost") -> list[str]:
    """A head line, a line a part and in all, and below it what training and generating take."""
    mixers = ", ".join(f"{n} {mixer}" for mixer, n in Counter(cost.mixer_types).items())
    runs = f" that each run {cost.layer_runs} times" if cost.layer_runs > 1 else ""
    assumed = " assumed: --vocab-size" if cost.is_vocab_size_assumed else ""
    assumed += ", width assumed: --size" if cost.is_size_assumed else ""
    rows: list[tuple[str, ...]] = [
        ("part", "parameters", "share", "FLOPs/token", "state bytes", "cache bytes/token")
    ]
    rows += [_cost_row(part, cost.n_parameters) for part in cost.parts]
    total = (f"{cost.n_parameters:,}", "100.0 %", f"{cost.flops_per_token:,.0f}", f"{cost.state_bytes:,}")
    rows.append(("total", *total, f"{cost.cache_bytes_per_token:,}"))
    training = _bytes(cost.training_bytes)
    generating = _bytes(cost.memory_bytes(cost.context))
    facts = [
        ("training", f"{cost.training_flops_per_token:,.0f} FLOPs per token (3 x forward)"),
        ("", f"{training} of weights, gradients and AdamW's moments in float32, without activations"),
        ("generating", f"{generating} of state and cache for each sequence of {cost.context:,} tokens"),
        ("", f"(states in float32, keys and values in {cost.dtype})"),
    ]
    facts += [
        ("", f"{part.name} stops growing at its window: it keeps {part.cache_tokens:,} tokens")
        for part in cost.parts
        if part.cache_tokens is not None
    ]
    facts += [
        ("FLOPs", "2 for each weight of a linear layer, and those of attention at the mean number of tokens"),
        ("", f"seen in a row of {cost.context:,}; not lookups, nor elementwise work (norms, gates ...)"),
    ]
    return [
        f"{mixers} layers{runs}, width {cost.hidden_size:,}, context {cost.context:,}, "
        f"vocabulary {cost.vocab_size:,}{assumed}",
        "",
        *(_columns(row) for row in rows),
        "",
        *(f"{name:<12}{fact}" for name, fact in facts),
    ]


def _cost_row(part: "PartCost", n_parameters: int) -> tuple[str, ...]:
    return (
        f"{part.name} x{part.n_layers}" if part.n_layers else part.name,
        f"{part.n_parameters:,}",
        f"{100 * part.n_parameters / n_parameters:.1f} %",
        f"{part.flops_per_token:,.0f}",
        f"{part.state_bytes:,}",
        f"{part.cache_bytes_per_token:,}",
    )


def _columns(row: tuple[str, ...]) -> str:
    return "".join(
        f"{cell:>{width}}" if column else f"{cell:<{width}}"
        for column, (cell, width) in enumerate(zip(row, _COST_WIDTHS, strict=True))
    )


def _first(words: Sequence[str], most: int = 3) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _bytes(n_bytes: float) -> str:
    """In the largest unit that leaves a figure before the point."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.0f} bytes" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"


class Display:
    """Renders the events of a run on stderr: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, facts="")
        self._line_s = 0.0
        self._renderers: dict[str, Callable[..., None]] = {
            "progress": self._progress,
            "note": self._note,
            "external_bar": self._external_bar,
            "corpus": self._corpus,
            "languages": self._languages,
            "tokenized": self._tokenized,
            "vectors": self._vectors,
            "planned": self._planned,
            "threads": self._threads,
            "model": self._model,
            "step": self._step,
            "validation": self._validation,
            "sample": self._sample,
            "milestone": self._milestone,
            "trained": self._trained,
            "resumed": self._resumed,
            "diverged": self._diverged,
            "run": self._run,
            "kept": self._kept,
            "finished": self._finished,
            "failed": self._failed,
            "measured": self._measured,
        }

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, description: str) -> None:
        """Name the stage that begins."""
        self.bar.update(self.task, description=description, total=None, completed=0, facts="")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False, soft_wrap=True)

    def note(self, messages: Sequence[str]) -> None:
        """Each as a line that stays."""
        for message in messages:
            self._note(message)

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        """The listener that `train` wants; events without a row in the table are not shown."""
        if event in self._renderers:
            self._renderers[event](**fields)

    def _external_bar(self, is_active: bool) -> None:
        """Hide our bar while a library shows its own."""
        if is_active:
            self.bar.stop()
        else:
            self.bar.start()

    def _progress(self, task: str, done: int, total: int | None) -> None:
        self.bar.update(self.task, description=task, completed=done, total=total, facts="")

    def _note(self, message: str) -> None:
        self.say(f"note          {message}")

    def _corpus(self, description: str, train: dict, validation: dict) -> None:
        self.say(f"corpus        {description}")
        for name, split in (("train", train), ("validation", validation)):
            what = "read while training"
            if split["documents"] is not None:
                several = "" if split["documents"] == 1 else "s"
                what = f"{split['documents']:,} document{several}, {split['bytes']:,} bytes"
            self.say(f"  {name:<12}{what}")

    def _languages(self, languages: dict[str, dict[str, Any]]) -> None:
        for code, of in languages.items():
            train, held = (of[split]["bytes"] for split in ("train", "validation"))
            times = "" if of["repeats"] == 1 else f", read {of['repeats']:.2f} times in a pass"
            self.say(f"  {code:<12}{train:,} bytes, {held:,} held out{times}")

    def _tokenized(
        self, vocab_size: int, train_tokens: int | None, validation_tokens: int, bytes_per_token: float
    ) -> None:
        to_train_on = "" if train_tokens is None else f"{train_tokens:,} to train on, "
        self.say(
            f"tokenizer     {vocab_size:,} tokens, {bytes_per_token} bytes per token; "
            f"{to_train_on}{validation_tokens:,} held out"
        )

    def _vectors(
        self, tokens: dict, share_of_text: dict, words: dict, dimension: int, file: str, **_: Any
    ) -> None:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in tokens.items())
        shares = ", ".join(f"{100 * share:.1f}" for share in share_of_text.values())
        skipped = sum(words["skipped"].values())
        self.say(
            f"vectors       {sum(tokens.values()):,} tokens: {kinds} ({shares} % of the text); "
            f"{words['read']:,} words of {dimension} in {file}{f', {skipped:,} skipped' if skipped else ''}"
        )

    def _planned(
        self,
        hidden_size: int,
        num_hidden_layers: int,
        step_s: float,
        tokens: int,
        threads: int,
        passes: float | None,
        **_: Any,
    ) -> None:
        times = "" if passes is None else f", {passes:g} times the text"
        self.say(
            f"planned       width {hidden_size}, {num_hidden_layers} layers, {threads} threads: "
            f"about {tokens:,} tokens at {1000 * step_s:.0f} ms a step{times}"
        )

    def _threads(self, step: int, threads: int) -> None:
        self.say(f"threads       {threads} from step {step} on: something else keeps a core busy")

    def _model(self, parameters: int, rows: int | None, max_seq_length: int) -> None:
        counted = "" if rows is None else f"{rows:,} "
        self.say(f"model         {parameters:,} parameters; {counted}rows of {max_seq_length} tokens")

    def _step(
        self, step: int, loss: float, tokens_per_s: int, left_s: float, progress: float, **_: Any
    ) -> None:
        facts = f"step {step}  loss {loss:.3f}  {tokens_per_s:,} tokens/s  {_clock(left_s)} left"
        self.bar.update(self.task, description="training", total=1.0, completed=progress, facts=facts)
        if not self.console.is_terminal and time.monotonic() - self._line_s >= 10:
            self._line_s = time.monotonic()
            self.say(f"training      {facts}")

    def _validation(self, step: int, bits_per_byte: float, perplexity: float, tokens: int, **_: Any) -> None:
        self.say(
            f"validation    step {step}: {bits_per_byte:.4f} bits per byte, perplexity {perplexity:.2f} "
            f"(on {tokens:,} tokens of the split)"
        )

    def _sample(self, text: str, **_: Any) -> None:
        shown = " ".join(text.split())
        self.say(f"sample        {shown[:160]}{'…' if len(shown) > 160 else ''}")

    def _milestone(self, step: int, words: int, folder: str) -> None:
        self.say(f"milestone     {folder}: {words:,} words after step {step:,}")

    def _resumed(self, step: int) -> None:
        self.say(f"resumed       after step {step:,}")

    def _diverged(self, step: int, back_to: int, learning_rate: float) -> None:
        self.say(
            f"diverged      the loss is no finite number after step {step:,}: back to step {back_to:,}, "
            f"at half of the rate, {learning_rate:g}"
        )

    def _run(self, run: str, number: int, of: int) -> None:
        self.say(f"run           {number} of {of}: {run}")
        self.show(f"{run}: starting")

    def _kept(self, run: str, number: int, of: int) -> None:
        self.say(f"run           {number} of {of}: {run} is done")

    def _finished(self, run: str, bits_per_byte: float, **_: Any) -> None:
        self.say(f"finished      {run}: {bits_per_byte:.4f} bits per byte")

    def _failed(self, run: str, reason: str, **_: Any) -> None:
        self.say(f"failed        {run}: {reason}")

    def _measured(self, place: str, run: str, accuracy: float, size: str, seconds: float) -> None:
        self.say(f"{place:<12}  {run:<28} {accuracy:.2f} at {size}  ({seconds:.0f} s)")

    def _trained(self, steps: int, tokens: int, seconds: float, tokens_per_s: int, **_: Any) -> None:
        self.say(
            f"trained       {steps:,} steps, {tokens:,} tokens in {seconds:.1f} s, {tokens_per_s:,} tokens/s"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
