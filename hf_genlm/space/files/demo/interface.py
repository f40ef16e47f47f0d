"""The web page of the demo: generate text, show states and attention, measure bits per byte."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

# set before gradio is imported: it sends no usage data
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from . import page
from .layers import last_token_attention, list_layers, recurrent_states
from .models import MAX_CHARACTERS, LanguageModel, decode_spans, load_models
from .scoring import Sampling, encode_prompt, generate, score_text

_HERE = Path(__file__).parent
_UPDATE_INTERVAL_S = 0.1
_MAX_COLUMNS = 256  # of the last tokens, states and attention are shown
_MAX_UPLOAD = 1  # byte: the page takes no files
_MAX_QUEUE = 32  # waiting requests; further ones are refused
# requests that compute share two workers
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}
# requests that only change the page
_AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
_BODY = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
_WRITTEN = '<div class="written">${value}</div>'
_CARET = '<i class="caret" title="the model continues from here"></i>'
_INTRODUCTION = (
    "Text from a small language model, with the probability of every token: the more a token stands out from "
    "the page, the less the model expected it."
)
_HINT = (
    "Touch a token for its probability, its rank and its most likely alternatives. These are the model's own "
    "probabilities, before temperature, top-k and top-p."
)
_LAYERS = (
    "How the model read the last text under Write: the state of a recurrent layer after each token, or the "
    "attention of the last token."
)
_MEASURING = (
    "Bits per byte: how many bits the model needs for each byte of a text, given the text before it. "
    "Lower is better. It compares models with different tokenizers."
)

History = list[list[int]]  # for each model, the tokens of its last text: prompt and continuation


def start(folder: Path) -> None:
    """Serve the demo in `folder` until stopped, at GRADIO_SERVER_NAME and GRADIO_SERVER_PORT."""
    space = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    build(load_models(folder), space["title"], space["examples"]).launch(
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="stone", font=_BODY, font_mono=_MONO),
        css=(_HERE / "style.css").read_text(encoding="utf-8"),
        head=f"<script>{(_HERE / 'details.js').read_text(encoding='utf-8')}</script>",
        footer_links=["gradio"],
        ssr_mode=False,
        share=False,
        max_file_size=_MAX_UPLOAD,
        app_kwargs={"middleware": _host_check()},
    )


def _host_check() -> list[Middleware]:
    """Refuse web pages behind a name that was pointed to this machine (rebinding), where only it may ask."""
    served = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    is_local = served in ("127.0.0.1", "localhost") and "SPACE_ID" not in os.environ
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])] if is_local else []


def build(models: Sequence[LanguageModel], title: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """Build the page for one model, or for two side by side, with `examples` of texts to try."""
    with gr.Blocks(title=title, analytics_enabled=False) as demo:
        gr.HTML(f"<header><h1>{escape(title)}</h1><p>{_INTRODUCTION}</p></header>")
        history = gr.State([[] for _ in models])
        with gr.Tabs():
            with gr.Tab("Write"):
                _add_writing(models, history, examples)
            with gr.Tab("Look inside"):
                _add_layers(models, history)
            with gr.Tab("Measure"):
                _add_measuring(models, examples)
    return demo.queue(max_size=_MAX_QUEUE)


def continue_text(
    models: Sequence[LanguageModel], prompt: str, sampling: Sampling
) -> Iterator[tuple[History, list[str], list[str]]]:
    """Continue one prompt with each model from the same seed.

    Yields tokens, HTML and remark of each model as they grow. The HTML grows only at its end, and gradio
    sends only the new part.
    """
    prompt = _valid_unicode(prompt)[-MAX_CHARACTERS:]
    prompts = [encode_prompt(model, prompt) for model in models]
    remarks = [
        page.note(f"The prompt has {n_tokens:,} tokens; the last {len(ids):,} are used.")
        if len(ids) < n_tokens
        else ""
        for ids, n_tokens in prompts
    ]
    history: History = [[] for _ in models]
    texts = ["" for _ in models]
    painters = [page.TokenPainter(model) for model in models]
    streams = [generate(model, ids, sampling) for model, (ids, _) in zip(models, prompts, strict=True)]
    last_update = 0.0
    for n_steps, step in enumerate(zip_longest(*streams)):
        for i, scores in enumerate(step):
            if scores is not None:
                history[i] += [score.token for score in scores]
                texts[i] += painters[i].paint(scores) + (_CARET if n_steps == 0 else "")
        if time.monotonic() - last_update > _UPDATE_INTERVAL_S:
            yield history, texts, remarks
            last_update = time.monotonic()
    yield history, [text + painter.finish() for text, painter in zip(texts, painters, strict=True)], remarks


def show_layer(model: LanguageModel, ids: list[int], label: str | None) -> str:
    """HTML of the layer with that label over the last tokens of a text."""
    layer = next((layer for layer in list_layers(model) if layer.label == label), None)
    if layer is None:
        return page.note(
            f"{model.name} is of the type {model.module.config.model_type}, which returns neither a "
            "recurrent state nor attention weights."
        )
    if not ids:
        return page.note("Write something first: this shows how the model read it.")
    start = model.start_ids
    shown = ids[-min(_MAX_COLUMNS, model.max_tokens - len(start)) :]
    spans = decode_spans(model.tokenizer, shown)
    if layer.is_attention:
        weights_HT = last_token_attention(model, start + shown, layer).numpy()
        view = page.attention_view(weights_HT, spans, len(start))
    else:
        view = page.state_view(recurrent_states(model, start + shown, layer), spans, len(start))
    return view + (page.note(f"The last {len(shown)} of {len(ids)} tokens.") if len(shown) < len(ids) else "")


def measure(models: Sequence[LanguageModel], text: str) -> str:
    """HTML of the bits per byte of `text` under each model."""
    if not text:
        return page.note("There is no text to measure.")
    used = _valid_unicode(text)[:MAX_CHARACTERS]
    view = page.scores_view([(model.name, score_text(model, used)) for model in models])
    return view + (page.note(f"The first {len(used):,} characters.") if len(used) < len(text) else "")


def _add_writing(models: Sequence[LanguageModel], history: gr.State, examples: Sequence[str]) -> None:
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="How should the text begin? Empty: the start of a document.",
        lines=3,
        max_lines=10,
        max_length=MAX_CHARACTERS,
        elem_id="prompt",
    )
    _add_examples(prompt, examples)
    with gr.Row(elem_classes="actions"):
        go = gr.Button("Write", variant="primary", elem_id="go", min_width=120)
        stop = gr.Button("Stop", elem_id="stop", min_width=120, interactive=False)
    controls = _add_sampling()
    gr.HTML(page.legend("Probability of each token", page.PROBABILITY_STEPS))
    texts, remarks = [], []
    with gr.Row(elem_classes="models"):
        for i, model in enumerate(models):
            with gr.Column(min_width=300, elem_classes="model"):
                gr.HTML(page.model_summary(model))
                texts.append(gr.HTML("", html_template=_WRITTEN, elem_id=f"written-{i}"))
                remarks.append(gr.HTML(""))
    gr.HTML(page.note(_HINT))

    def run(
        prompt: str, length: int, temperature: float, top_k: int, top_p: float, penalty: float, seed: int
    ) -> Iterator[list[Any]]:
        sampling = Sampling(int(length), temperature, int(top_k), top_p, penalty, int(seed or 0))
        for tokens, shown, said in continue_text(models, prompt, sampling):
            yield [tokens, *shown, *said]

    def buttons(is_running: bool) -> Callable[[], list[Any]]:
        return lambda: [gr.update(interactive=not is_running), gr.update(interactive=is_running)]

    started = gr.on([go.click, prompt.submit], buttons(True), None, [go, stop], **_AT_ONCE)
    outputs = [history, *texts, *remarks]
    running = started.then(
        run, [prompt, *controls], outputs, show_progress="hidden", api_name="write", **_QUEUE
    )
    running.then(buttons(False), None, [go, stop], **_AT_ONCE)
    stop.click(buttons(False), None, [go, stop], cancels=[running], **_AT_ONCE)


def _add_sampling() -> list[Any]:
    """Add the controls, in the order of the fields of `Sampling`."""
    default = Sampling()
    with gr.Accordion("Sampling", open=False):
        with gr.Row():
            length = gr.Slider(1, 400, default.max_new_tokens, step=1, label="New tokens", info="at most")
            temperature = gr.Slider(
                0, 2, default.temperature, step=0.05, label="Temperature", info="0: greedy"
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


def _add_layers(models: Sequence[LanguageModel], history: gr.State) -> None:
    gr.HTML(page.note(_LAYERS))
    with gr.Row(elem_classes="models"):
        for i, model in enumerate(models):
            with gr.Column(min_width=300, elem_classes="model"):
                _add_layer(i, model, history)


def _add_layer(i: int, model: LanguageModel, history: gr.State) -> None:
    gr.HTML(page.model_summary(model))
    labels = [layer.label for layer in list_layers(model)]
    chosen = gr.Dropdown(labels, value=labels[-1] if labels else None, label="Layer", elem_id=f"layer-{i}")
    view = gr.HTML(show_layer(model, [], chosen.value), elem_id=f"inside-{i}")

    def show(history: History, label: str) -> str:
        return show_layer(model, history[i], label)

    gr.on(
        [chosen.change, history.change], show, [history, chosen], view, show_progress="hidden",
        api_visibility="private", trigger_mode="always_last", **_QUEUE,
    )  # fmt: skip


def _add_measuring(models: Sequence[LanguageModel], examples: Sequence[str]) -> None:
    gr.HTML(page.note(_MEASURING))
    text = gr.Textbox(label="Text", lines=6, max_lines=14, max_length=MAX_CHARACTERS, elem_id="measured")
    _add_examples(text, examples)
    button = gr.Button("Measure", variant="primary", elem_id="measure")
    result = gr.HTML("", elem_id="scores")
    button.click(lambda text: measure(models, text), text, result, api_name="measure", **_QUEUE)


def _add_examples(box: gr.Textbox, examples: Sequence[str]) -> None:
    if examples:
        gr.Examples([[text] for text in examples], box, label="Try", api_visibility="private")


def _valid_unicode(text: str) -> str:
    """Replace lone surrogates, which a browser may send, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
