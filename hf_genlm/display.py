"""How the command line shows a run: the events on stderr, the measurements as a table."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_genlm.evaluation.measurement import Measurement


def table(measurements: Sequence["Measurement"]) -> str:
    """One line a measurement: name, value, standard error, unit, count."""
    lines = []
    for m in measurements:
        error = f"± {m.stderr:.4f}" if m.stderr is not None else ""
        lines.append(f"{m.name:<16} {m.value:>10.4f} {error:<10} {m.unit:<12} n = {m.n:,} ({m.split})")
    return "\n".join(lines)


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
            "corpus": self._corpus,
            "tokenized": self._tokenized,
            "vectors": self._vectors,
            "model": self._model,
            "step": self._step,
            "validation": self._validation,
            "sample": self._sample,
            "trained": self._trained,
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

    def hear(self, event: str, fields: dict[str, Any]) -> None:
        """The listener that `train` wants; events without a row in the table are not shown."""
        if event in self._renderers:
            self._renderers[event](**fields)

    def _progress(self, task: str, done: int, total: int | None) -> None:
        self.bar.update(self.task, description=task, completed=done, total=total, facts="")

    def _corpus(self, description: str, train: dict, validation: dict) -> None:
        self.say(f"corpus        {description}")
        for name, split in (("train", train), ("validation", validation)):
            self.say(f"  {name:<12}{split['documents']:,} documents, {split['bytes']:,} bytes")

    def _tokenized(
        self, vocab_size: int, train_tokens: int, validation_tokens: int, bytes_per_token: float
    ) -> None:
        self.say(
            f"tokenizer     {vocab_size:,} tokens, {bytes_per_token} bytes per token; "
            f"{train_tokens:,} to train on, {validation_tokens:,} held out"
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

    def _model(self, parameters: int, rows: int, row_length: int) -> None:
        self.say(f"model         {parameters:,} parameters; {rows:,} rows of {row_length} tokens")

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

    def _trained(self, steps: int, tokens: int, seconds: float, tokens_per_s: int, **_: Any) -> None:
        self.say(
            f"trained       {steps:,} steps, {tokens:,} tokens in {seconds:.1f} s, {tokens_per_s:,} tokens/s"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
