"""Output of the command line: progress of a run on stderr, lines and tables on stdout.

Nothing else of the package prints. Names, listings, messages and generated text come from others: control
characters in them are escaped here, so that they cannot steer the terminal or look like another line.
"""

import codecs
import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from hf_genlm.errors import escape_controls
from hf_genlm.run_folder import describe_step

if TYPE_CHECKING:
    from hf_genlm.doctor import Installation, ModelCost
    from hf_genlm.evaluation.measurement import Measurement


LOADING = "loading torch and transformers"
_PLAIN = {"±": "+-", "…": "..", "·": "*"}  # where the encoding has no such character


def prepare_streams() -> None:
    """Let stdout and stderr print every text: what their encoding lacks is escaped, and a closed one is
    replaced by a file that keeps nothing."""
    codecs.register_error("escaped", _escape_unencodable)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escaped")


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("unicode_escape").decode() for c in wrong), error.end


class _Lasting:
    """stderr, without errors: a training goes on when its terminal or the reader of its progress has gone."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def say(*lines: object, is_error: bool = False) -> None:
    """Print each argument as one line, an empty one if there are none, on stdout or as an error on stderr."""
    file: Any = _Lasting() if is_error else sys.stdout
    print("\n".join(escape_controls(str(line)) for line in lines), file=file, flush=True)


def print_json(content: Any) -> None:
    """Print JSON in ASCII, whose strings hold no control characters."""
    print(json.dumps(content, indent=2))


def print_generated(text: str) -> None:
    """Print a piece of generated text: exactly for a file or another program, escaped on a terminal."""
    print(escape_controls(text, keep="\n\t") if sys.stdout.isatty() else text, end="", flush=True)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a fault of this package; a sys.excepthook."""
    lines = "".join(traceback.format_exception(kind, error, trace))
    print(escape_controls(lines, keep="\n\t"), end="", file=_Lasting())


def print_rows(
    rows: Sequence[Sequence[str]],
    head: Sequence[str] = (),
    right: frozenset[int] | set[int] = frozenset(),
    is_folded: bool = False,
) -> None:
    """Print a table; columns in `right` are right-aligned.

    A row takes one line, however narrow the terminal is; with `is_folded`, cells are folded to its width.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=bool(head), padding=(0, 2, 0, 0), header_style="bold")
    for column in range(len(rows[0])):
        name = head[column] if head else ""
        table.add_column(name, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_controls(cell)) for cell in row))
    console = Console(highlight=False)
    if not (is_folded and console.is_terminal):
        width = console.width
        console.width = 100_000  # a table is measured within the width of its console
        console.width = max(width, console.measure(table).maximum)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_measurements(measurements: Sequence["Measurement"]) -> None:
    """Print a table with a row for each measurement, and one with a row for each language or milestone."""
    from hf_genlm.evaluation.measurement import tabulate

    for number, (head, rows) in enumerate(tabulate(measurements)):
        if number:
            say()
        right = {i for i, name in enumerate(head) if name in ("value", "n")}
        print_rows(rows, head, right=right)


def print_installation(found: "Installation") -> None:
    """Print versions, devices, extras, and the device and number format that `train` would use."""
    environment = found.environment
    facts = [(name, str(environment[name])) for name in ("python", "platform")]
    facts.append(("cpu cores", str(environment["cpu_count"])))
    facts += [(name, version or "not installed") for name, version in environment["packages"].items()]
    facts += [("device", device) for device in found.devices]
    facts.append(("bfloat16", "native" if found.is_bfloat16_native else "not native here"))
    for extra in found.extras:
        missing = ", ".join(extra.missing[:3]) + (" .." if len(extra.missing) > 3 else "")
        state = f"missing {missing}: {extra.command}" if extra.missing else "installed"
        facts.append((f"[{extra.name}]", f"{extra.purpose}: {state}" if extra.purpose else state))
    facts.append(("train", f"on {found.training_device}, in {found.training_dtype} by training.dtype=auto"))
    if found.n_training_gpus > 1:
        n = found.n_training_gpus
        facts.append(("", f"with --processes {n} on all GPUs, or --processes 1 on the first GPU"))
    print_rows(facts)


def print_model_cost(cost: "ModelCost") -> None:
    """Print the parts of a model with their costs, the totals, and the memory that it takes."""
    mixers = ", ".join(f"{n} {mixer}" for mixer, n in Counter(cost.mixer_types).items())
    repeats = f" that each run {cost.layer_runs} times" if cost.layer_runs > 1 else ""
    assumed = " assumed: --vocab-size" if cost.is_vocab_size_assumed else ""
    assumed += ", width assumed: --size" if cost.is_size_assumed else ""
    say(
        f"{mixers} layers{repeats}, width {cost.hidden_size:,}, context {cost.context:,}, "
        f"vocabulary {cost.vocab_size:,}{assumed}",
        "",
    )
    rows = [
        (
            f"{part.name} x{part.n_layers}" if part.n_layers else part.name,
            f"{part.n_parameters:,}",
            f"{100 * part.n_parameters / cost.n_parameters:.1f} %",
            f"{part.flops_per_token:,.0f}",
            f"{part.state_bytes:,}",
            f"{part.cache_bytes_per_token:,}",
        )
        for part in cost.parts
    ]
    total = (f"{cost.n_parameters:,}", "100.0 %", f"{cost.flops_per_token:,.0f}", f"{cost.state_bytes:,}")
    rows.append(("total", *total, f"{cost.cache_bytes_per_token:,}"))
    head = ("part", "parameters", "share", "FLOPs/token", "state bytes", "cache bytes/token")
    print_rows(rows, head, right=set(range(1, 6)))
    training = [
        ("training", f"{cost.training_flops_per_token:,.0f} FLOPs per token (3 x forward)"),
        (
            "",
            f"{_bytes(cost.training_bytes)} of weights, gradients and AdamW's moments in float32, without "
            "activations",
        ),
    ]
    counting = (
        f"at most {_bytes(cost.weight_bytes)} in {cost.n_parameters:,} numbers, whatever the text: "
        "model.ngram_entries bounds them"
    )
    facts = [
        *(training if cost.n_trained else [("counting", counting)]),
        (
            "generating",
            f"{_bytes(cost.memory_bytes(cost.context))} of state and cache for each sequence of "
            f"{cost.context:,} tokens",
        ),
        ("", f"(states in float32, keys and values in {cost.dtype})"),
    ]
    facts += [
        ("", f"{part.name} keeps the last {part.cache_tokens:,} tokens, the size of its window")
        for part in cost.parts
        if part.cache_tokens is not None
    ]
    facts += [
        ("FLOPs", "2 for each weight of a linear layer; attention at the mean number of visible tokens"),
        ("", f"in a row of {cost.context:,}; without lookups and elementwise work (norms, gates, ..)"),
    ]
    say()
    print_rows(facts)


def _bytes(n_bytes: float) -> str:
    """Write a size in the largest unit that leaves a digit before the point."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.0f} bytes" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} TiB"


class Display:
    """Show the events of a run on stderr: a live bar on a terminal, plain lines elsewhere.

    `stage` is the one that begins, such as `LOADING`.
    """

    def __init__(self, stage: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = Console(file=cast(Any, _Lasting()), highlight=False)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self.console,
            transient=True,
            disable=not sys.stderr.isatty(),  # rich takes FORCE_COLOR for a terminal
        )
        self.task = self.bar.add_task(stage, total=None, facts="")
        self._line_s = 0.0
        self._lines: dict[str, Callable[..., str]] = {
            "note": lambda message: f"note          {message}",
            "vectors": _vectors_line,
            "planned": _planned_line,
            "threads": _threads_line,
            "model": _model_line,
            "validation": lambda step, bits_per_byte, perplexity, tokens, **_: (
                f"validation    step {step}: {bits_per_byte:.4f} bits per byte, perplexity {perplexity:.2f} "
                f"(on {tokens:,} tokens of the split)"
            ),
            "sample": _sample_line,
            "milestone": lambda step, words, folder: (
                f"milestone     {folder}: {words:,} words after step {step:,}"
            ),
            "counted": lambda order, entries, tokens, **_: (
                f"counted       {tokens:,} tokens, {entries:,} n-grams of up to {order} tokens"
            ),
            "counts": lambda order, bits_per_byte: (
                f"counts        {order}-grams alone need {bits_per_byte:.4f} bits per byte (--decoder ngram)"
            ),
            "forecast": _forecast_line,
            "trained": lambda steps, tokens, seconds, tokens_per_s, **_: (
                f"trained       {steps:,} steps, {tokens:,} tokens in {seconds:.1f} s, "
                f"{tokens_per_s:,} tokens/s"
            ),
            "resumed": lambda step: f"resumed       after step {step:,}",
            "diverged": lambda step, back_to, learning_rate: (
                f"diverged      the loss became NaN or infinite after step {step:,}: back to step "
                f"{back_to:,}, at half of the learning rate, {learning_rate:g}"
            ),
            "tokenized": _tokenized_line,
            "run": lambda run, number, of: f"run           {number} of {of}: {run}",
            "kept": lambda run, number, of: f"run           {number} of {of}: {run} is done",
            "finished": lambda run, bits_per_byte, **_: (
                f"finished      {run}: {bits_per_byte:.4f} bits per byte"
            ),
            "failed": lambda run, reason, **_: f"failed        {run}: {reason}",
            "measured": lambda place, run, accuracy, size, seconds: (
                f"{place:<12}  {run:<28} {accuracy:.2f} at {size}  ({seconds:.0f} s)"
            ),
        }

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, stage: str) -> None:
        """Name the stage that begins."""
        self._update(stage, total=None, completed=0)

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        """Show one event; this is the listener that the services take. Unknown events are not shown."""
        if event == "progress":
            self._update(fields["task"], completed=fields["done"], total=fields["total"])
        elif event == "external_bar":  # a library shows its own bar meanwhile
            (self.bar.stop if fields["is_active"] else self.bar.start)()
        elif event == "step":
            self._show_step(fields)
        elif event == "corpus":
            from hf_genlm.text.corpus import LARGE_OVERLAP

            self._print(f"corpus        {fields['description']}")
            for split in ("train", "validation"):
                self._print(f"  {split:<12}{_size_of_split(fields[split])}")
            share = fields.get("held_out_in_training")
            if share is not None and share < LARGE_OVERLAP:  # above, a note says so with its remedy
                self._print(f"  {'':<12}{100 * share:.1f} % of it stands in the training text too")
        elif event == "languages":
            for code, sizes in fields["languages"].items():
                train, held_out = (sizes[split]["bytes"] for split in ("train", "validation"))
                times = "" if sizes["repeats"] == 1 else f", read {sizes['repeats']:.2f} times in an epoch"
                self._print(f"  {code:<12}{train:,} bytes, {held_out:,} held out{times}")
        elif event in self._lines:
            if line := self._lines[event](**fields):
                self._print(line)
            if event == "run":
                self.show(f"{fields['run']}: starting")

    def _print(self, line: str) -> None:
        self.console.print(escape_controls(line), markup=False, emoji=False, soft_wrap=True)

    def _update(self, task: str, facts: str = "", **progress: Any) -> None:
        self.bar.update(self.task, description=escape_controls(task), facts=facts, **progress)

    def _show_step(self, fields: dict[str, Any]) -> None:
        facts = describe_step(fields)
        self._update("training", facts, total=1.0, completed=fields["progress"])
        if self.bar.disable and time.monotonic() - self._line_s >= 10:
            self._line_s = time.monotonic()
            self._print(f"training      {facts}")


def _size_of_split(split: dict[str, Any]) -> str:
    if split["documents"] is None:
        return "read while training"
    return (
        f"{split['documents']:,} document{'' if split['documents'] == 1 else 's'}, {split['bytes']:,} bytes"
    )


def _tokenized_line(
    vocab_size: int, train_tokens: int | None, validation_tokens: int, bytes_per_token: float
) -> str:
    train = "" if train_tokens is None else f"{train_tokens:,} to train on, "
    return (
        f"tokenizer     {vocab_size:,} tokens, {bytes_per_token} bytes per token; "
        f"{train}{validation_tokens:,} held out"
    )


def _threads_line(step: int, threads: int, most: int) -> str:
    if threads == most:
        return f"threads       {threads} from step {step:,} on: the cores are free again" if step else ""
    return (
        f"threads       {threads} of {most} from step {step:,} on, which is faster now: another program uses "
        f"the cores, or the model is small; the number rounds sums, and training.num_threads={most} fixes it"
    )


def _vectors_line(tokens: dict, share_of_text: dict, words: dict, dimension: int, file: str, **_: Any) -> str:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in tokens.items())
    shares = ", ".join(f"{100 * share:.1f}" for share in share_of_text.values())
    skipped = sum(words["skipped"].values())
    return (
        f"vectors       {sum(tokens.values()):,} tokens: {kinds} ({shares} % of the text); "
        f"{words['read']:,} words of {dimension} in {file}{f', {skipped:,} skipped' if skipped else ''}"
    )


def _planned_line(
    hidden_size: int,
    num_hidden_layers: int,
    step_s: float,
    tokens: int,
    threads: int,
    passes: float | None,
    **_: Any,
) -> str:
    epochs = "" if passes is None else f", {passes:g} epochs"
    return (
        f"planned       width {hidden_size}, {num_hidden_layers} layers, {threads} threads: "
        f"about {tokens:,} tokens at {1000 * step_s:.0f} ms a step{epochs}"
    )


def _forecast_line(expected: float | None, times: float | None, bits_per_byte: float) -> str:
    longer = "more time would help little: the text is read training.max_epochs times at most; add text"
    if times is not None:
        longer = f"{times:.2g} times the time: about {bits_per_byte:.2f} bits per byte"
    return f"forecast      {'' if expected is None else f'about {expected:.2f} bits per byte; '}{longer}"


def _model_line(
    parameters: int, rows: int | None, max_seq_length: int | None, of_counts: int | None = None
) -> str:
    size = f"{parameters:,} parameters" + (f", {of_counts:,} of them n-gram counts" if of_counts else "")
    if max_seq_length is None:
        return f"model         {size}"
    counted = "" if rows is None else f"{rows:,} "
    return f"model         {size}; {counted}rows of {max_seq_length} tokens"


def _sample_line(text: str, **_: Any) -> str:
    shown = " ".join(text.split())
    return f"sample        {shown[:160]}{'…' if len(shown) > 160 else ''}"
