"""The verbs that use or publish a trained model: generate, chat, serve, space, export and push."""

import os
import shlex
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hf_genlm.cli import options as o
from hf_genlm.cli.display import LOADING, Display, print_generated, print_json, say
from hf_genlm.errors import UserError, escape_controls

if TYPE_CHECKING:
    from hf_genlm.hub.manifest import Manifest


_COUNTS_LEFT_OUT = (
    "left out: the n-gram counts of this model, which the format cannot hold; the network alone predicts "
    "worse. hf-genlm train --set model.ngram_order=0 makes a model without counts"
)


@o.verb("generate", "Use", 'hf-genlm generate lstm-10 "Once upon a time"')
def generate(
    model: str = o.MODEL,
    prompt: str = o.argument("PROMPT", "Empty: the start of a document.", ""),
    max_new_tokens: int = o.option("--max-new-tokens N", "Tokens to generate.", 200, parse=o.parse_count),
    temperature: float = o.option(
        "--temperature F", "0: always the most probable token.", 0.8, parse=o.parse_amount
    ),
    top_p: float = o.option(
        "--top-p F", "Sample from the tokens of this probability.", 0.95, parse=o.parse_amount
    ),
    seed: int | None = o.option("--seed N", "Of the sampling."),
    compile: bool = o.option(
        "--compile", "Compile for models of this shape first, and keep the program on disk."
    ),
    int8: bool = o.option("--int8", "Round the weights to 8 bits, on a CPU."),
    as_json: bool = o.JSON,
) -> None:
    """Continue a prompt."""
    from hf_genlm.loading import load, source_of

    source_of(model)  # before the wait for torch
    with Display(LOADING):
        from hf_genlm.api import generate as continue_prompt

        loaded = load(model)
    text = continue_prompt(
        loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        compile=compile, int8=int8, on_text=None if as_json else print_generated,
    )  # fmt: skip
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        say()


@o.verb("chat", "Use", "hf-genlm chat lstm-10 temperature=0.5", takes_rest=True)
def chat(
    ctx: typer.Context,
    model: str = o.MODEL,
    url: str | None = o.option("--url URL", "Of a running server.", shown="a server for this talk"),
) -> None:
    """Talk to a model in the terminal; further words are generation settings."""
    from hf_genlm.loading import source_of
    from hf_genlm.serving import background_server, check_installed

    source = source_of(model)
    check_installed()
    with background_server(source) if url is None else nullcontext(url) as url:
        # the client connects to this URL only; an offline mode meant for the Hub would forbid it
        os.environ.pop("HF_HUB_OFFLINE", None)
        import click  # the app of transformers raises click's exceptions or typer's, by the version of typer
        from transformers.cli.transformers import app

        client: Any = import_module("transformers.cli.chat")
        client.RichInterface.print_model_load = lambda self, model: None  # asks for a path that we lack
        shown = client.Markdown  # of what the model writes
        client.Markdown = lambda text, **rest: shown(escape_controls(text, "\n\t"), hyperlinks=False, **rest)
        try:
            app(["chat", source, url, *ctx.args], standalone_mode=False)
        except (typer.Exit, typer.Abort, click.exceptions.Exit, click.Abort):  # --help; end of the input
            return
        except (typer.TyperException, click.ClickException) as error:
            raise UserError(f"transformers chat: {error.format_message()}") from error
        except client.httpx.HTTPError as error:
            raise UserError(f"the server at {url}: {error}") from error


@o.verb("serve", "Use", "hf-genlm serve lstm-10 --port 8000")
def serve(
    model: str = o.MODEL,
    host: str = o.option("--host ADDRESS", "Who can reach another address may use it.", "localhost"),
    port: int = o.option("--port N", "Where to listen.", 8000, parse=o.parse_count),
) -> None:
    """Serve a model by an OpenAI-compatible API to the programs of this machine."""
    from hf_genlm.loading import source_of
    from hf_genlm.serving import serve as serve_model

    source_of(model)  # before the wait for torch
    asked = shlex.quote('{"messages": [{"role": "user", "content": "Hello"}]}')
    call = f"/v1/chat/completions -H 'Content-Type: application/json' -d {asked}"
    serve_model(
        model, host, port,
        lambda url: say(f"serving {model} on {url}; Ctrl-C ends it", f"curl {url}{call}"),
    )  # fmt: skip


@o.verb("space", "Publish", "hf-genlm space lstm-10 gru-10 --out demo")
def space(
    models: list[str] = o.argument("MODEL", "One model, or two side by side.", ...),
    output_dir: str | None = o.option("--out DIR", "The folder to make; needed without --run."),
    repo_ids: list[str] | None = o.option(
        "--repo-id OWNER/NAME", "The id of each MODEL on the Hub.", shown="its files go into the folder"
    ),
    title: str | None = o.option("--title TITLE", "Title.", shown="the names of the models"),
    examples: list[str] | None = o.option(
        "--example TEXT", "A text to try on its pages.", shown="beginnings of the samples of a run"
    ),
    run: bool = o.option("--run", "Serve it on this machine until Ctrl-C."),
    allow: list[str] | None = o.option("--allow FILE:KIND", "Include what was found there anyway."),
    port: int | None = o.option("--port N", "For --run.", shown="7860", parse=o.parse_count),
) -> int:
    """Write a demo for the browser, to run here or to push as a Space."""
    from hf_genlm.space.build import DEFAULT_PORT, build_space, run_space

    if output_dir is None and not run:
        raise UserError("name the folder of the demo, --out DIR, or run it at once, --run")
    if port is not None and not run:
        raise UserError(f"--port {port} is where the demo is served: add --run")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(output_dir or Path(temporary) / "space")
        built = build_space(
            models, out, repo_ids=repo_ids or (), title=title, examples=examples or (), allow=allow or ()
        )
        if output_dir is not None:
            say(
                *(f"{size:>12,}  {name}" for name, size in built.sizes.items()),
                f"{sum(built.sizes.values()):>12,}  bytes in {out}",
                "",
                f"python {shlex.quote(str(out / 'app.py'))}  # runs it here",
                "",
                "# as a Space, every file above goes to the Hub:",
                *built.push_commands,
            )
        if not run:
            return 0
        port = port or DEFAULT_PORT
        say(f"serving on http://127.0.0.1:{port}, once the models are loaded; Ctrl-C ends it")
        return run_space(out, port)


@o.verb("export", "Publish", "hf-genlm export lstm-10 --to onnx --out lstm-10-onnx")
def export(
    model: str = o.MODEL,
    to: str = o.option("--to FORMAT", "llama, qwen3, gguf or onnx.", ...),
    output_dir: str = o.option("--out DIR", "The folder to make.", ...),
    dtype: str | None = o.option(
        "--dtype TYPE", "Of the weights; for gguf also float16 or q8_0.", shown="float32"
    ),
    allow: list[str] | None = o.option("--allow FILE:KIND", "Export what was found there anyway."),
    as_json: bool = o.JSON,
) -> None:
    """Write a model for transformers alone, llama.cpp or onnxruntime."""
    with Display(LOADING) as display:
        from hf_genlm.exporting import export as export_model

        found = export_model(
            model, to=to, output_dir=output_dir, dtype=dtype, allow=allow or (), listener=display.hear
        )
    sizes = {str(file): file.stat().st_size for file in sorted(Path(output_dir).iterdir())}
    if as_json:
        print_json({"folder": output_dir, "files": sizes, **asdict(found)})
        return
    say(
        *(f"{size:>14,} bytes  {name}" for name, size in sizes.items()),
        f"largest difference of a logit from the model's own: {found.largest_difference:.1e}, on "
        f"{found.n_tokens} tokens of {found.n_texts} texts; the most probable token is the same after "
        f"{found.n_same_choice}",
        *([_COUNTS_LEFT_OUT] if found.leaves_out_counts else []),
        f"exported: {output_dir}",
    )


@o.verb("push", "Publish", "hf-genlm push lstm-10 USER/MODEL --dry-run")
def push(
    ctx: typer.Context,
    path: str = o.argument("RUN", "A run folder or a model folder.", ...),
    repo_id: str = o.argument("OWNER/NAME", "The repository; it is made if there is none.", ...),
    private: bool = o.option("--private", "Make the repository private."),
    dry_run: bool = o.option("--dry-run", "List what would be sent, and send nothing."),
    tag: str | None = o.option("--tag NAME", "Of this version.", shown="the next of v1, v2, .."),
    branches: bool = o.option("--branches", "The run's milestones too, a branch each."),
    keep_card: bool = o.option("--keep-card", "Push README.md as it is."),
    allow: list[str] | None = o.option("--allow FILE:KIND", "Send what was found there anyway."),
    as_json: bool = o.JSON,
) -> None:
    """Publish a model on the Hub, and prove that it loads from there."""
    from hf_genlm.hub.push import PushFailed
    from hf_genlm.hub.push import push as push_model

    display, is_shown = Display(), False
    with ExitStack() as stack:

        def hear(event: str, fields: dict[str, Any]) -> None:
            nonlocal is_shown
            if event == "manifest":
                if not as_json:
                    _print_manifest(fields["manifest"])
                return
            if not is_shown:
                stack.enter_context(display)
                is_shown = True
            display.hear(event, fields)

        try:
            result = push_model(
                path, repo_id, private=private, tag=tag, branches=branches, keep_card=keep_card,
                allow=allow or (), dry_run=dry_run, listener=hear,
            )  # fmt: skip
        except PushFailed as error:
            raise UserError(f"{error}: {shlex.join(['hf-genlm', *ctx.meta[o.WORDS]])}") from error
    if as_json:
        manifests = [{"folder": str(m.folder), "files": m.sizes} for m in result.manifests]
        print_json({**asdict(replace(result, manifests=[])), "manifests": manifests})
        return
    if result.commit is None:
        say("nothing was sent")
        return
    say(
        f"pushed: {result.url}",
        f"commit: {result.commit}",
        f"tag:    {result.tag}",
        *(f"branch: {name}" for name in result.branches),
        *([f"card:   its example loads {result.revision}"] if result.revision else []),
        "read back: every file as it was sent; it generates in a process without hf_genlm",
        "",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{result.repo_id}", revision="{result.tag}", '
        "trust_remote_code=True)",
    )


def _print_manifest(manifest: "Manifest") -> None:
    """Print each file with its size, and the total."""
    say(
        f"{manifest.folder}:", *(f"  {size:>14,}  {name}" for name, size in manifest.sizes.items()),
        f"  {manifest.num_bytes:>14,}  bytes in {len(manifest.sizes)} files", "",
    )  # fmt: skip
