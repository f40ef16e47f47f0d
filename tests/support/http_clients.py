"""Helpers shared by tests: HTTP requests as bytes, and a model that generates given text."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch


def send_bytes(url: str, *parts: bytes, pause_s: float = 0.0, timeout_s: float = 30.0) -> bytes:
    """Send parts of a request on a connection of its own; return all that comes back until it is closed."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout_s) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            while piece := connection.recv(2**16):
                answer += piece
        except ConnectionError:  # closed by the server before the end of the request
            pass
        return answer


def request_bytes(method: str, path: str, body: bytes = b"", *headers: str, host: str = "localhost") -> bytes:
    """A request of HTTP/1.1 after which the connection is closed; `headers` after those that it needs."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if body and not any(header.lower().startswith("content-") for header in headers):
        lines.append("Content-Type: application/json")
    if body and not any("-encoding:" in each.lower() or "-length:" in each.lower() for each in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def exchange(url: str, *request, **options) -> tuple[int, dict, str]:
    """Send a request; return its status, its headers in small letters, and the body of the answer."""
    head, _, body = send_bytes(url, request_bytes(*request, **options)).partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    pairs = (header.lower().split(": ", 1) for header in headers)
    return int(status.split()[1]), dict(pairs), body.decode()


class ScriptedModel:
    """A model whose `generate` writes `text`, token by token, and counts what it wrote."""

    config = SimpleNamespace(position_type="none", max_position_embeddings=64)
    generation_config = SimpleNamespace(eos_token_id=0)
    device = torch.device("cpu")

    def __init__(self, tokenizer, text: str, token_s: float = 0.0):
        self.ids = tokenizer(text).input_ids
        self.token_s, self.n_written, self.options = token_s, 0, []

    def generate(self, inputs, *, streamer, max_new_tokens, **options):
        self.options.append({**options, "max_new_tokens": max_new_tokens})
        streamer.put(inputs)
        for token in self.ids[:max_new_tokens]:
            time.sleep(self.token_s)
            self.n_written += 1
            streamer.put(torch.tensor([token]))
        streamer.end()


async def call(app, path: str, asked: dict, leave_after_s: float | None = None) -> list[dict]:
    """Call an application (ASGI) with a JSON body; return the messages that it sends.

    The client leaves after `leave_after_s`, or stays to the end.
    """
    body = json.dumps(asked).encode()
    incoming: asyncio.Queue = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    if leave_after_s is not None:
        leave = {"type": "http.disconnect"}
        asyncio.get_running_loop().call_later(leave_after_s, incoming.put_nowait, leave)
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    await app(scope, incoming.get, send)
    return sent
