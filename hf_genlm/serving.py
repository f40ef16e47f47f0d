"""Serve a model by an OpenAI-compatible API.

The server is for the programs of one machine: it refuses web pages of other origins, answers four paths, and
bounds what a client may send and hold. A field of a request that it does not know is refused by its name.
"""

import asyncio
import ipaddress
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn

from hf_genlm.errors import UserError, install_command
from hf_genlm.loading import load, names_of
from hf_genlm.text.encoding import encode_messages, encode_texts

LIBRARIES = ("fastapi", "openai", "pydantic", "uvicorn")  # what the server and transformers' client need

_MAX_BODY = 2**18  # bytes of a request
_MAX_DRAINED = 2**26  # bytes of a longer request that are read, so that its client reads the refusal
_MAX_TOKENS = 16_384  # prompt and continuation
_MAX_REQUESTS = 64  # one generates, the others wait
_MAX_CONNECTIONS = 256
_REQUEST_S = 300.0  # for waiting and generating
_IDLE_S = 10.0  # of a connection without a complete request
_MIN_TEMPERATURE = 1e-3  # below it the most probable token is taken, as the logits would overflow
_HOST = re.compile(r"(\[[\da-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)
_FAILED = "the model failed: the server's log has the reason"
_log = logging.getLogger("uvicorn.error")


def _number(of: type, low: float, high: float) -> tuple[Any, str]:
    kinds = (int, float) if of is float else (of,)
    return lambda value: type(value) in kinds and low <= value <= high, f"{of.__name__} from {low} to {high}"


def _are_stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= 16 and all(isinstance(text, str) and 1 <= len(text) <= 256 for text in texts)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"} or value["role"] not in _ROLES:
        return False
    content = value["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in parts) and all(
        part["type"] == "text" and isinstance(part["text"], str) for part in parts
    )


def _are_messages(value: Any) -> bool:
    are = isinstance(value, list) and len(value) <= 256 and all(map(_is_message, value))
    return are and any(message["content"] for message in value)


_ROLES = ("system", "developer", "user", "assistant")
_TEXT = (lambda value: isinstance(value, str) and value != "", "a text that is not empty")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_NEW_TOKENS = _number(int, 1, 4096)
_SAMPLING = {
    "max_new_tokens": _NEW_TOKENS, "do_sample": _FLAG, "temperature": _number(float, 0, 100),
    "top_p": _number(float, 1e-6, 1), "top_k": _number(int, 0, 2**31), "min_p": _number(float, 0, 1),
    "repetition_penalty": _number(float, 0.1, 10),
}  # fmt: skip
_FIELDS: dict[str, tuple[Any, str]] = {  # what a request may hold: does a value fit, and what is expected
    **_SAMPLING, "max_tokens": _NEW_TOKENS, "max_completion_tokens": _NEW_TOKENS, "model": _TEXT,
    "prompt": _TEXT, "stream": _FLAG, "seed": _number(int, 0, 2**63 - 1), "user": _TEXT,
    "stop": (_are_stops, "up to 16 texts of 1 to 256 characters"), "generation_config": _TEXT,
    "messages": (_are_messages, f"up to 256, each with a role of {_ROLES} and a content of text alone"),
    "transformers_version": _TEXT,  # in a generation_config
}  # fmt: skip
# other fields of OpenAI's API, as they stand where nothing is asked for
_NEUTRAL = {
    "n=1", "best_of=1", "echo=false", "logprobs=false", 'suffix=""', "logit_bias={}", "presence_penalty=0",
    "presence_penalty=0.0", "frequency_penalty=0", "frequency_penalty=0.0",
}  # fmt: skip


def serve(
    source: str, host: str = "localhost", port: int = 8000, on_ready: Callable[[str], None] = lambda url: None
) -> None:
    """Serve the run, model folder or Hub id `source` until stopped; `on_ready` is called with the URL.

    Raises:
        UserError: the server's libraries are not installed, nothing can listen there, or no model loads.
    """
    check_installed()
    import uvicorn

    try:  # before the wait for the model
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        message = f"cannot listen at {host}, port {port} ({reason}): name another --port or --host"
        raise UserError(message) from error
    config = uvicorn.Config(
        Server(*load(source), source, host), host=host, port=port, http=_bounded_protocol(), ws="none",
        lifespan="off", proxy_headers=False, server_header=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    _log.setLevel(logging.WARNING)
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    on_ready(f"http://{shown}:{port}")
    uvicorn.Server(config).run()


def check_installed() -> None:
    """
    Raises:
        UserError: what the server and transformers' client need is not installed.
    """
    if any(find_spec(name) is None for name in LIBRARIES):
        raise UserError(f"serving needs more libraries: {install_command('serve')}")


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


def _bounded_protocol() -> Any:
    """uvicorn's HTTP protocol with a bound on connections, and on the time that each may take."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        timer: asyncio.TimerHandle

        def abort_after(self, seconds: float) -> None:
            self.timer.cancel()
            self.timer = self.loop.call_later(seconds, self.transport.abort)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            wait_s = _IDLE_S if len(self.connections) <= _MAX_CONNECTIONS else 0
            self.timer = self.loop.call_later(wait_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before and not self.cycle.response_complete:
                self.abort_after(2 * _REQUEST_S)  # also where the client does not read its response
            # uvicorn stops to read at a second request, and would not see the client leave
            if self.cycle and not self.cycle.response_complete and self.conn.trailing_data[0]:
                self.transport.abort()

        def on_response_complete(self) -> None:
            self.abort_after(_IDLE_S)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

    return BoundedProtocol


class _Refusal(Exception):
    """An HTTP status of 4xx or 5xx and its reason."""


def _refuse(status: int, reason: str) -> NoReturn:
    raise _Refusal(status, reason)


class Server:
    """The application (ASGI). One generation runs at a time; the others wait in their order."""

    def __init__(self, model: Any, tokenizer: Any, name: str, host: str):
        self.model, self.tokenizer, self.name, self.host = model, tokenizer, name, host.lower()
        self.names = {None, *names_of(name)}
        self.thread, self.n_requests = ThreadPoolExecutor(1), 0
        # learned positions end there, as may those of other packages' models
        context = getattr(model.config, "max_position_embeddings", None)
        is_bounded = getattr(model.config, "position_type", "learned") == "learned"
        self.max_tokens = min(context, _MAX_TOKENS) if context and is_bounded else _MAX_TOKENS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        try:
            self.check_sender(request.headers)
            match request.method, scope["path"]:
                case "GET", "/health":
                    await JSONResponse({"status": "ok"})(scope, receive, send)
                case "GET", "/v1/models":
                    model = {"id": self.name, "object": "model", "created": 0, "owned_by": ""}
                    await JSONResponse({"object": "list", "data": [model]})(scope, receive, send)
                case "POST", "/v1/completions" | "/v1/chat/completions":
                    asked = _parse(await _read_body(request), is_chat="chat" in scope["path"])
                    if not {"prompt", "messages"} & asked.keys():
                        _refuse(400, "no prompt, or no messages for a chat")
                    if asked.get("model") not in self.names:
                        _refuse(404, "model: not served here; GET /v1/models names the served one")
                    await self.generate(asked, scope, receive, send)
                case _:
                    _refuse(404, "not found")
        except _Refusal as refusal:
            status, reason = refusal.args
            kind = "invalid_request_error" if status < 500 else "server_error"
            error = {"message": reason, "type": kind, "param": None, "code": None}
            later = {"Retry-After": "5"} if status == 503 else None
            await JSONResponse({"error": error}, status, later)(scope, receive, send)
        except ClientDisconnect:
            return

    def check_sender(self, headers: Any) -> None:
        """Refuse pages of other origins, also behind a name that was pointed to this machine (rebinding)."""
        hosts = [host.lower() for host in headers.getlist("host")]
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        name = found[1].strip("[]") if found else ""
        try:
            is_own = ipaddress.ip_address(name).is_loopback or self.host in ("0.0.0.0", "::", name)
        except ValueError:
            is_own = name != "" and name in ("localhost", self.host)
        if not is_own:
            _refuse(403, "the Host header must name this server: localhost, or the address of --host")
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if set(origins) - {f"http://{hosts[0]}"} or set(sites) - {"same-origin", "none"}:
            _refuse(403, "web pages of other origins may not use this server")

    async def generate(self, asked: dict[str, Any], scope: Any, receive: Any, send: Any) -> None:
        """Answer a checked request; a client that leaves ends its generation."""
        if self.n_requests >= _MAX_REQUESTS:
            _refuse(503, f"{_MAX_REQUESTS} requests are in progress: try again later")
        self.n_requests += 1
        tasks: list[asyncio.Task[None]] = []
        generation = running = None
        try:
            ids = await asyncio.to_thread(self.encode, asked)
            generation = _Generation(self.model, self.tokenizer, ids, asked, self.max_tokens)
            running = self.thread.submit(generation.run)
            sending = _respond(generation, asked, self.name, scope, receive, send)
            tasks = [asyncio.create_task(each) for each in (sending, _wait_for_leaving(receive))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.n_requests -= 1
            for task in tasks:
                task.cancel()
            if generation is not None and running is not None:
                generation.is_cancelled, generation.prompt = True, []
                running.cancel()

    def encode(self, asked: dict[str, Any]) -> list[int]:
        """Return the token ids of a prompt or of messages."""
        if "prompt" in asked:
            ids = encode_texts(self.tokenizer, [asked["prompt"]], add_special_tokens=True)[0]
        else:
            contents = [each["content"] for each in asked["messages"]]
            texts = [c if isinstance(c, str) else " ".join(part["text"] for part in c) for c in contents]
            messages = [{**m, "content": text} for m, text in zip(asked["messages"], texts, strict=True)]
            try:
                ids = encode_messages(self.tokenizer, messages, add_generation_prompt=True)
            except Exception as error:  # whatever the model's template raises
                _log.warning("the chat template: %r", error)
                _refuse(400, "messages: the chat template of the model does not take them")
        if not 0 < len(ids) < self.max_tokens:
            _refuse(400, f"the prompt has {len(ids)} tokens: expected 1 to {self.max_tokens - 1}")
        return list(ids)


async def _wait_for_leaving(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Any) -> bytes:
    """Read a JSON body, whatever length its headers state."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        _refuse(415, "the body must be JSON: Content-Type: application/json, not compressed")

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            body += chunk if size <= _MAX_BODY else b""
            if size > _MAX_DRAINED:
                break
        return bytes(body) if size <= _MAX_BODY else _refuse(413, f"the body is over {_MAX_BODY:,} bytes")

    try:
        return await asyncio.wait_for(read(), _IDLE_S)
    except asyncio.TimeoutError:
        _refuse(408, f"the body did not arrive within {_IDLE_S:.0f} s")


def _parse(text: str | bytes, is_chat: bool) -> dict[str, Any]:
    """Return the fields of a JSON object, each checked; those of `generation_config` are among them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(pairs) if len(dict(pairs)) == len(pairs) else _refuse(400, "a key stands twice")

    try:
        text = text if isinstance(text, str) else text.decode()
        given = json.loads(text, object_pairs_hook=unique)
        json.dumps(given, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate, no NaN
    except (ValueError, RecursionError) as error:
        _refuse(400, f"not JSON in UTF-8: {ascii(str(error))[:200]}")
    if not isinstance(given, dict):
        _refuse(400, "expected a JSON object")
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or f"{name}={json.dumps(value)}" in _NEUTRAL:
            continue
        if name not in _FIELDS or name == ("prompt" if is_chat else "messages"):
            _refuse(400, f"{ascii(name[:64])[1:-1]}: not supported")
        fits, expected = _FIELDS[name]
        if not fits(value):
            _refuse(400, f"{name}: expected {expected}")
        asked["max_new_tokens" if name.startswith("max_") else name] = value
    return {**_parse(asked.pop("generation_config", "{}"), is_chat), **asked} if text != "{}" else asked


def _sampling_options(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `generate`: greedy at a temperature of 0, sampling where one asks for it."""
    options = {"max_new_tokens": 1024, **{name: asked[name] for name in _SAMPLING if name in asked}}
    of_sampling = {"temperature", "top_p", "top_k", "min_p"} & options.keys()
    is_cold = options.get("temperature", 1) < _MIN_TEMPERATURE
    if is_cold or options.get("do_sample") is False:
        return {**{name: options[name] for name in options.keys() - of_sampling}, "do_sample": False}
    return {"do_sample": True, **options} if of_sampling else options


class _End(Exception):
    """Raised in `put` to end `generate`."""


class _Generation:
    """A continuation in a thread of its own, the streamer of its own `generate`.

    `pieces` receives its text, then None, or the exception that ended it. No text from a stop string on is in
    it, however that string is split over tokens: text that may begin one is held back.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: list[int], asked: dict[str, Any], max_tokens: int):
        from tokenizers.decoders import DecodeStream

        self.model, self.tokenizer, self.prompt, self.seed = model, tokenizer, ids, asked.get("seed")
        self.n_prompt, self.options, stop = len(ids), _sampling_options(asked), asked.get("stop", [])
        self.stops = stop if isinstance(stop, list) else [stop]
        self.options["max_new_tokens"] = min(self.options["max_new_tokens"], max_tokens - len(ids))
        self.loop, self.deadline = asyncio.get_running_loop(), time.monotonic() + _REQUEST_S
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.decoder = DecodeStream([], skip_special_tokens=True)
        self.is_cancelled = self.is_stopped = self.has_prompt = False
        self.ids: list[int] = []
        self.held, self.n_sent = "", 0  # text; number of characters

    def run(self) -> None:
        import torch

        try:
            inputs = torch.tensor([self.prompt], device=self.model.device)
            if self.is_cancelled:
                return
            torch.seed() if self.seed is None else torch.manual_seed(self.seed)
            self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), streamer=self, tokenizer=self.tokenizer,
                num_beams=1, num_return_sequences=1, **self.options,
            )  # fmt: skip
            self.end_text()
        except _End:
            self.end_text()
        except Exception as error:
            _log.exception("a generation failed")
            self.tell(error)

    def put(self, value: Any) -> None:
        """Take the prompt, then each token."""
        if self.is_cancelled or time.monotonic() > self.deadline:
            raise _End
        if self.has_prompt:
            self.ids.append(value.item())
            self.held += self.decoder.step(self.tokenizer.backend_tokenizer, self.ids[-1]) or ""
            self.write()
            if self.is_stopped:
                raise _End
        self.has_prompt = True

    def end(self) -> None:
        """Do nothing: `generate` calls it, and `run` writes the rest."""

    def end_text(self) -> None:
        if not self.is_stopped:  # the decoder keeps back what may be a part of a character
            self.held = self.tokenizer.decode(self.ids, skip_special_tokens=True)[self.n_sent :]
            self.write(is_last=True)
        self.tell(None)

    def write(self, is_last: bool = False) -> None:
        """Send the held text up to a stop string, and without what may begin one."""
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        begins = [n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        n = min(found) if found else len(self.held) - (0 if is_last else max(begins, default=0))
        self.is_stopped = bool(found)
        if n:
            self.tell(self.held[:n])
        self.held, self.n_sent = self.held[n:], self.n_sent + n

    def tell(self, piece: Any) -> None:
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    @property
    def finish_reason(self) -> str:
        ends = self.model.generation_config.eos_token_id
        is_end = self.ids and self.ids[-1] in (ends if isinstance(ends, list) else [ends])
        return "stop" if self.is_stopped or is_end else "length"

    @property
    def usage(self) -> dict[str, int]:
        n = self.n_prompt, len(self.ids)
        return {"prompt_tokens": n[0], "completion_tokens": n[1], "total_tokens": sum(n)}


async def _respond(
    generation: _Generation, asked: dict[str, Any], name: str, scope: Any, receive: Any, send: Any
) -> None:
    """Send the text of a generation, whole or as a stream of events, in OpenAI's format."""
    from starlette.responses import JSONResponse, StreamingResponse

    is_chat, is_stream = "messages" in asked, asked.get("stream", False)
    kind = "chat.completion" + ".chunk" * is_stream if is_chat else "text_completion"
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
    try:
        piece = await asyncio.wait_for(generation.pieces.get(), _REQUEST_S)
    except asyncio.TimeoutError:
        _refuse(503, "no turn came in time: try again later")

    def form(text: str, reason: str | None = None, role: str | None = None, **rest: Any) -> dict[str, Any]:
        said = {"content": text, **({"role": role} if role else {})}
        choice = {"delta" if is_stream else "message": said} if is_chat else {"text": text, "logprobs": None}
        return {**head, "choices": [{"index": 0, **choice, "finish_reason": reason}], **rest}

    async def events() -> AsyncIterator[str]:
        nonlocal piece
        role: str | None = "assistant"  # in the first event alone
        while isinstance(piece, str):
            yield f"data: {json.dumps(form(piece, role=role))}\n\n"
            piece, role = await generation.pieces.get(), None
        last = {"error": {"message": _FAILED, "type": "server_error"}}
        last = last if piece else form("", generation.finish_reason, role, usage=generation.usage)
        yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"

    if is_stream and not isinstance(piece, Exception):
        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)
        return
    text = ""
    while isinstance(piece, str):
        text += piece
        piece = await generation.pieces.get()
    if piece is not None:
        _refuse(500, _FAILED)
    said = form(text, generation.finish_reason, "assistant", usage=generation.usage)
    await JSONResponse(said)(scope, receive, send)
