"""Serve a model by transformers' OpenAI-compatible server, and chat with it by transformers' client.

The server looks up a model class by name in the module `transformers`; `expose` adds the classes of this
package there.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from hf_genlm.errors import UserError

LIBRARIES = ("fastapi", "openai", "pydantic", "uvicorn")  # what transformers' server and client need


def serve(source: str, options: Sequence[str] = ()) -> None:
    """Serve the model folder or Hub id `source` until stopped, by an OpenAI-compatible API.

    `options` are those of `transformers serve`, such as `["--port", "9000"]`.

    Raises:
        UserError: the server's libraries are not installed, or it does not know an option.
    """
    _check_installed()
    from transformers.cli.serving.model_manager import ModelManager

    # transformers lists the Hub cache, and fails without one; this server has one model
    served = {"id": source, "object": "model", "created": int(time.time()), "owned_by": ""}
    listing: Any = ModelManager
    listing.get_gen_models = staticmethod(lambda cache_dir=None: [served])
    _run_transformers(["serve", source, *options])


def chat(source: str, url: str | None = None, flags: Sequence[str] = ()) -> None:
    """Chat with the model `source` as served at `url`, or by a server that runs until the chat ends.

    `flags` are generation settings as the client takes them, such as `["temperature=0.5"]`.

    Raises:
        UserError: the server's libraries are not installed, or the server does not start.
    """
    _check_installed()
    with background_server(source) if url is None else nullcontext(url) as url:
        # the client connects to this URL only; an offline mode meant for the Hub would forbid it
        os.environ.pop("HF_HUB_OFFLINE", None)
        _run_transformers(["chat", source, url, *flags])


def expose() -> None:
    """Add the classes of this package to the module `transformers`, for code that looks them up by name."""
    import transformers

    from hf_genlm.model.modeling_genlm import AUTO_CLASSES

    for model_class in AUTO_CLASSES.values():
        setattr(transformers, model_class.__name__, model_class)


def _check_installed() -> None:
    if any(find_spec(name) is None for name in LIBRARIES):
        raise UserError("serving needs more libraries: from a clone, pip install '.[serve]'")


def _run_transformers(arguments: list[str]) -> None:
    import click  # the app of transformers raises click's exceptions or typer's, by the version of typer
    import typer
    from transformers.cli.transformers import app

    expose()
    try:
        app(arguments, standalone_mode=False)
    except (
        typer.Exit,
        typer.Abort,
        click.exceptions.Exit,
        click.Abort,
    ):  # after --help; at the end of the input
        return
    except (typer.TyperException, click.ClickException) as error:
        raise UserError(f"transformers {arguments[0]}: {error.format_message()}") from error


@contextmanager
def background_server(source: str, timeout_s: float = 300.0) -> Iterator[str]:
    """The URL of a server of `source` in a process of its own, on a free port, until the block ends.

    Raises:
        UserError: it ended or did not answer within `timeout_s`; the message is its last line.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    command = [sys.executable, "-m", "hf_genlm", "serve", source, "--port", str(port)]
    # by the import path of this process: the current folder may be a stranger's
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **paths}) as server,
    ):
        try:
            deadline = time.monotonic() + timeout_s
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
                    raise UserError(f"the server of {source!r} did not start: {last}")
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
