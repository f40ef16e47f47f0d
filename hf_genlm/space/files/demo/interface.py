"""The page: write, look inside, measure."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

# before gradio is imported: it reports to no one, and no address but that of this page is needed
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from . import page
from .characters import spell
from .inside import attention_of, layers_of, states_of
from .models import MOST_CHARACTERS, LanguageModel, load_models
from .scoring import score_text
from .writing import Settings, prompt_of, write

_HERE = Path(__file__).parent
_SECONDS_BETWEEN_UPDATES = 0.1
_MOST_COLUMNS = 256  # tokens of a look inside, the last ones
_MOST_WAITING = 32  # requests in the queue; a further one is refused in words
# requests that share the processor, whatever they ask for
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}
# what only moves the page about
_AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
_BODY = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
_WRITTEN = '<div class="written">${value}</div>'
_CARET = '<i class="caret" title="the model writes from here"></i>'

History = list[list[int]]  # for each model, the tokens of its last text: the prompt and what it wrote


def start(folder: Path) -> None:
    """Serve the demo of `folder` until stopped, where GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say."""
    stated = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    build(load_models(folder), stated["title"]).launch(**launch_options())


def launch_options() -> dict[str, Any]:
    """Its looks: files of this folder, and fonts of the visitor's machine."""
    script = (_HERE / "details.js").read_text(encoding="utf-8")
    return {
        "theme": gr.themes.Base(primary_hue="teal", neutral_hue="stone", font=_BODY, font_mono=_MONO),
        "css": (_HERE / "style.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
        "footer_links": ["gradio"],
        "ssr_mode": False,
    }


def build(models: Sequence[LanguageModel], title: str) -> gr.Blocks:
    """The page for one model, or two side by side."""
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.HTML(f"<header><h1>{page.plain(title)}</h1><p>{_INTRODUCTION}</p></header>")
        history = gr.State([[] for _ in models])
        with gr.Tabs():
            with gr.Tab("Write"):
                _writing_tab(models, history)
            with gr.Tab("Look inside"):
                _inside_tab(models, history)
            with gr.Tab("Measure"):
                _measuring_tab(models)
    return demo.queue(max_size=_MOST_WAITING)


def answer(
    models: Sequence[LanguageModel], prompt: str, settings: Settings
) -> Iterator[tuple[History, list[str], list[str]]]:
    """Each model's tokens, coloured text and remark, as they grow side by side from one prompt and seed.

    A text grows at its end alone, which is then all that is sent.
    """
    prompt = _readable(prompt)[-MOST_CHARACTERS:]
    cuts = [prompt_of(model, prompt) for model in models]
    remarks = [_remark_on(cut.n_tokens, len(cut.ids)) for cut in cuts]
    history: History = [[] for _ in models]
    texts = ["" for _ in models]
    painters = [page.TokenPainter(model) for model in models]
    writers = [write(model, cut.ids, settings) for model, cut in zip(models, cuts, strict=True)]
    shown_at = 0.0
    for n_steps, step in enumerate(zip_longest(*writers)):
        for i, scores in enumerate(step):
            if scores is not None:
                history[i] += [score.token for score in scores]
                texts[i] += painters[i].paint(scores) + (_CARET if n_steps == 0 else "")
        if time.monotonic() - shown_at > _SECONDS_BETWEEN_UPDATES:
            yield history, texts, remarks
            shown_at = time.monotonic()
    yield history, [text + painter.finish() for text, painter in zip(texts, painters, strict=True)], remarks


def look_inside(model: LanguageModel, ids: list[int], label: str | None) -> str:
    """The view of the layer of that label over the last tokens of a text."""
    layer = next((layer for layer in layers_of(model) if layer.label == label), None)
    if layer is None:
        return page.note(
            f"{model.name}, a model of the type {model.module.config.model_type}, shows neither a recurrent "
            "state nor its attention."
        )
    if not ids:
        return page.note("Write something first: this shows how the model read it.")
    before = model.start_ids
    kept = ids[-min(_MOST_COLUMNS, model.most_tokens - len(before)) :]
    spans = spell(model.tokenizer, kept)
    if layer.is_attention:
        view = page.attention_view(attention_of(model, before + kept, layer).numpy(), spans, len(before))
    else:
        view = page.state_view(states_of(model, before + kept, layer), spans, len(before))
    return view + (page.note(f"The last {len(kept)} of {len(ids)} tokens.") if len(kept) < len(ids) else "")


def measure(models: Sequence[LanguageModel], text: str) -> str:
    """Bits per byte of `text` under each model."""
    if not text:
        return page.note("There is nothing to measure yet: put in a text.")
    read = _readable(text)[:MOST_CHARACTERS]
    view = page.scores_view([(model.name, score_text(model, read)) for model in models])
    return view + (page.note(f"The first {len(read):,} characters.") if len(read) < len(text) else "")


def _writing_tab(models: Sequence[LanguageModel], history: gr.State) -> None:
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="How should the text begin? Nothing: the start of a document.",
        lines=3,
        max_lines=10,
        max_length=MOST_CHARACTERS,
        elem_id="prompt",
    )
    with gr.Row(elem_classes="actions"):
        go = gr.Button("Write", variant="primary", elem_id="go", min_width=120)
        stop = gr.Button("Stop", elem_id="stop", min_width=120, interactive=False)
    sampling = _sampling_controls()
    gr.HTML(page.legend("Probability of each token", page.PROBABILITY_STEPS))
    texts, remarks = [], []
    with gr.Row(elem_classes="models"):
        for i, model in enumerate(models):
            with gr.Column(min_width=300, elem_classes="model"):
                gr.HTML(page.facts(model))
                texts.append(gr.HTML("", html_template=_WRITTEN, elem_id=f"written-{i}"))
                remarks.append(gr.HTML(""))
    gr.HTML(page.note(_HINT))

    def run(
        prompt: str, length: int, temperature: float, top_k: int, top_p: float, penalty: float, seed: int
    ) -> Iterator[list[Any]]:
        settings = Settings(int(length), temperature, int(top_k), top_p, penalty, int(seed or 0))
        for tokens, shown, said in answer(models, prompt, settings):
            yield [tokens, *shown, *said]

    def buttons(is_running: bool) -> Callable[[], list[Any]]:
        return lambda: [gr.update(interactive=not is_running), gr.update(interactive=is_running)]

    begun = gr.on([go.click, prompt.submit], buttons(True), None, [go, stop], **_AT_ONCE)
    outputs = [history, *texts, *remarks]
    running = begun.then(
        run, [prompt, *sampling], outputs, show_progress="hidden", api_name="write", **_QUEUE
    )
    running.then(buttons(False), None, [go, stop], **_AT_ONCE)
    stop.click(buttons(False), None, [go, stop], cancels=[running], **_AT_ONCE)


def _sampling_controls() -> list[Any]:
    """In the order of the fields of `Settings`."""
    default = Settings()
    with gr.Accordion("Sampling", open=False):
        with gr.Row():
            length = gr.Slider(1, 400, default.max_new_tokens, step=1, label="New tokens", info="at most")
            temperature = gr.Slider(
                0, 2, default.temperature, step=0.05, label="Temperature", info="0: always the likeliest"
            )
        with gr.Row():
            top_k = gr.Slider(0, 200, default.top_k, step=1, label="Top-k", info="0: off")
            top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", info="1: off")
        with gr.Row():
            penalty = gr.Slider(
                1, 2, default.repetition_penalty, step=0.05, label="Repetition penalty", info="1: off"
            )
            seed = gr.Number(
                default.seed, label="Seed", info="the same seed, the same text", precision=0, minimum=0
            )
    return [length, temperature, top_k, top_p, penalty, seed]


def _inside_tab(models: Sequence[LanguageModel], history: gr.State) -> None:
    gr.HTML(page.note(_INSIDE))
    with gr.Row(elem_classes="models"):
        for i, model in enumerate(models):
            with gr.Column(min_width=300, elem_classes="model"):
                _inside_column(i, model, history)


def _inside_column(i: int, model: LanguageModel, history: gr.State) -> None:
    gr.HTML(page.facts(model))
    labels = [layer.label for layer in layers_of(model)]
    chosen = gr.Dropdown(labels, value=labels[-1] if labels else None, label="Layer", elem_id=f"layer-{i}")
    view = gr.HTML(look_inside(model, [], chosen.value), elem_id=f"inside-{i}")

    def look(history: History, label: str) -> str:
        return look_inside(model, history[i], label)

    gr.on(
        [chosen.change, history.change], look, [history, chosen], view, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last", **_QUEUE,
    )  # fmt: skip


def _measuring_tab(models: Sequence[LanguageModel]) -> None:
    gr.HTML(page.note(_MEASURING))
    text = gr.Textbox(label="Text", lines=6, max_lines=14, max_length=MOST_CHARACTERS, elem_id="measured")
    button = gr.Button("Measure", variant="primary", elem_id="measure")
    result = gr.HTML("", elem_id="scores")
    button.click(lambda text: measure(models, text), text, result, api_name="measure", **_QUEUE)


def _readable(text: str) -> str:
    """With U+FFFD for halves of surrogate pairs, which a browser may send and no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _remark_on(n_tokens: int, n_read: int) -> str:
    if n_read == n_tokens:
        return ""
    return page.note(f"The prompt has {n_tokens:,} tokens; the last {n_read:,} are read.")


_INTRODUCTION = (
    "A small language model, and what it thinks of every token: the darker one is, the less it was expected."
)
_HINT = (
    "Touch a token for its probability, its rank and what else might have stood there. These are the "
    "probabilities of the model itself, before temperature and cuts."
)
_INSIDE = (
    "What the model held of the text it wrote last: the state of a recurrent layer after each token, or "
    "where an attention layer looks from the last one."
)
_MEASURING = (
    "Bits per byte: how many bits the model needs for each byte of a text, given what stands before it. "
    "Lower is better, and models with different tokenizers compare by it."
)
