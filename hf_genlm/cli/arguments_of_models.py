"""The verbs that take a model or a run that is done, and their options."""

import argparse
from typing import Any

from hf_genlm.cli.option_types import amount, count

MODEL_HELP = "a run folder, a model folder or a Hub id"


def add_verbs_of_models(verbs: Any) -> None:
    """Add them to those of the command line."""
    for add in (
        _add_generate,
        _add_serving,
        _add_space,
        _add_card,
        _add_plot,
        _add_push,
        _add_export,
    ):
        add(verbs)


def _add_generate(verbs: Any) -> None:
    generate = verbs.add_parser("generate", help="continue a prompt")
    generate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    generate.add_argument(
        "prompt", nargs="?", default="", metavar="PROMPT", help="nothing: the start of a document"
    )
    generate.add_argument("--max-new-tokens", type=count, default=200, metavar="N")
    generate.add_argument(
        "--temperature", type=amount, default=0.8, metavar="F", help="0: always the likeliest token"
    )
    generate.add_argument("--top-p", type=amount, default=0.95, metavar="F")
    generate.add_argument("--seed", type=int, metavar="N")
    generate.add_argument(
        "--compile", action="store_true", help="make fast code for models of this shape first, and keep it"
    )
    generate.add_argument("--int8", action="store_true", help="round the weights to 8 bits, on a CPU")


def _add_serving(verbs: Any) -> None:
    serve = verbs.add_parser("serve", help="serve a model by an OpenAI-compatible API")
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    serve.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of transformers serve")
    chat = verbs.add_parser("chat", help="talk to a model in the terminal")
    chat.add_argument("--url", help="of a running server; default: one of our own for this talk")
    chat.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    chat.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="settings such as temperature=0.5"
    )


def _add_space(verbs: Any) -> None:
    space = verbs.add_parser("space", help="write a demo for the browser, and run it or push it as a Space")
    space.add_argument("models", nargs="+", metavar="MODEL", help=f"one, or two side by side: {MODEL_HELP}")
    space.add_argument("--out", metavar="DIR", help="the folder to make; without it, only --run")
    space.add_argument(
        "--repo-id",
        action="append",
        default=[],
        dest="repo_ids",
        metavar="OWNER/NAME",
        help="of each MODEL on the Hub, to name it there; default: its files go into the folder",
    )
    space.add_argument("--title", help="default: the names of the models")
    space.add_argument("--run", action="store_true", help="serve it on this machine until Ctrl-C")
    space.add_argument("--port", type=count, metavar="N", help="for --run (default 7860)")


def _add_card(verbs: Any) -> None:
    card = verbs.add_parser("card", help="write the model card of a run again")
    card.add_argument("run_path", metavar="RUN")
    card.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="card.KEY=VALUE",
        help="license, authors, ...: kept in the recipe of the run",
    )
    card.add_argument("--force", action="store_true", help="in place of a card that was changed by hand, too")


def _add_plot(verbs: Any) -> None:
    plot = verbs.add_parser("plot", help="draw the curves of a run, or of several over one another")
    plot.add_argument("run_paths", nargs="+", metavar="RUN")
    plot.add_argument(
        "--out",
        metavar="FILE",
        help="the PNG to write (default: plots/curves.png of the run; of several, curves.png here)",
    )


def _add_push(verbs: Any) -> None:
    push = verbs.add_parser("push", help="publish a model on the Hub, and prove that it loads from there")
    push.add_argument("path", metavar="RUN", help="a run folder or a model folder")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; it is made where there is none")
    push.add_argument("--private", action="store_true", help="make it for you alone")
    push.add_argument("--dry-run", action="store_true", help="show what would leave, and send nothing")
    push.add_argument("--tag", metavar="NAME", help="of this version (default: the next of v1, v2 ...)")
    push.add_argument("--branches", action="store_true", help="the run's milestones too, a branch each")
    push.add_argument("--keep-card", action="store_true", help="push README.md as it is")
    push.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FILE:KIND",
        help="let what was found leave",
    )


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser("export", help="write a model for transformers alone, llama.cpp or onnxruntime")
    export.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    export.add_argument("--to", required=True, metavar="FORMAT", help="llama, qwen3, gguf or onnx")
    export.add_argument(
        "--dtype", metavar="TYPE", help="of the weights: float32 (default); of gguf float16 or q8_0 too"
    )
    export.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
