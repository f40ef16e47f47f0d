"""Promise: a saved model is served by an OpenAI-compatible API, and `chat` talks to it.

The server does what a program of this machine asks for, and refuses by its name what it does not do. Web
pages of other origins get nothing. No client can make it hold much memory, or work after it has left.
"""

import asyncio
import contextlib
import importlib
import json
import shlex
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from support.command_line import last_line
from support.http_clients import ScriptedModel, call, exchange, request_bytes, send_bytes

from hf_genlm.cli.main import main
from hf_genlm.serving import LIBRARIES, Server, background_server

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in LIBRARIES), reason="pip install '.[serve]'"
)


@pytest.fixture(scope="module")
def server(trained):
    with background_server(str(trained.model)) as url:
        yield url


@pytest.fixture
def client(server):
    import openai

    with contextlib.closing(openai.OpenAI(base_url=f"{server}/v1", api_key="none")) as client:
        yield client


def test_the_served_model_is_listed(client, trained):
    assert [model.id for model in client.models.list()] == [str(trained.model)]


def test_completion_is_what_generate_gives(client, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    prompt = tokenizer("The value of", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    answer = client.completions.create(
        model=str(trained.model), prompt="The value of", max_tokens=12, temperature=0
    )
    assert answer.choices[0].text == tokenizer.decode(text, skip_special_tokens=True)
    assert answer.usage.completion_tokens == 12


def test_chat_streams_what_it_answers_at_once(client, trained):
    asked = {
        "model": str(trained.model),
        "messages": [{"role": "user", "content": "The value of"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    ]
    assert len(pieces) > 3
    assert "".join(pieces) == whole != ""


def test_chat_in_the_terminal(server, trained):
    done = subprocess.run(
        [sys.executable, "-m", "hf_genlm", "chat", "--url", server, str(trained.path), "max_new_tokens=8"],
        input="The value of\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.split(f"<{trained.model}>:")[1]
    assert "8 tokens in" in answer


def test_escape_sequences_of_a_model_do_not_reach_the_terminal_of_a_chat(trained, monkeypatch, capsys):
    """transformers' client prints what a model writes as Markdown; its app is replaced by that print."""
    chat_client = importlib.import_module("transformers.cli.chat")
    monkeypatch.setattr(chat_client, "Markdown", chat_client.Markdown)  # restored afterwards
    monkeypatch.setattr(chat_client.RichInterface, "print_model_load", None)

    def app(words, standalone_mode):
        text = "a\x1b]0;owned\x07 [click](javascript:alert(1)) \u202eb"
        chat_client.Console(force_terminal=True).print(chat_client.Markdown(text, code_theme="github-dark"))

    monkeypatch.setattr("transformers.cli.transformers.app", app)
    assert main(["chat", "--url", "http://localhost:1", str(trained.path)]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07" in printed
    assert not {"\x07", "\u202e"} & set(printed)
    assert "\x1b]" not in printed


def test_a_server_that_cannot_start_says_why(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "no model at" in last_line(capsys)
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows-this"}')
    assert main(["chat", str(tmp_path)]) == 2
    assert "no weights in model.safetensors" in last_line(capsys)
    (tmp_path / "model.safetensors").touch()
    assert main(["chat", str(tmp_path)]) == 2
    assert "did not start" in last_line(capsys)


def test_serve_prints_its_address_and_a_command_that_asks(trained, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self: ran.append(self.config.app))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert main(["serve", str(trained.path), "--port", str(port)]) == 0
    where, command = capsys.readouterr().out.splitlines()[-2:]
    assert f"http://localhost:{port};" in where
    curl, url, _, header, _, body = shlex.split(command)
    assert (curl, header) == ("curl", "Content-Type: application/json")
    sent = asyncio.run(call(ran[0], url.removeprefix(f"http://localhost:{port}"), json.loads(body)))
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("address", [["--port", "TAKEN"], ["--port", "99999"], ["--host", "no.such.invalid"]])
def test_an_address_that_cannot_be_had_is_told_in_one_line(trained, capsys, address):
    with socket.create_server(("localhost", 0)) as taken:
        words = [word.replace("TAKEN", str(taken.getsockname()[1])) for word in address]
        assert main(["serve", str(trained.path), *words]) == 2
    assert "cannot listen at" in last_line(capsys)


def test_a_request_may_name_the_run(trained, tokenizer):
    def status(served, asked) -> int:
        server = Server(ScriptedModel(tokenizer, TEXT), tokenizer, str(served), "localhost")
        fields = {"prompt": "The", "model": str(asked), "max_tokens": 1}
        return asyncio.run(call(server, "/v1/completions", fields))[0]["status"]

    names = [trained.path, trained.model, trained.path.name]
    assert {status(served, asked) for served in (trained.path, trained.model) for asked in names} == {200}
    assert status("owner/model", "model") == status("owner/model", "owner/model") == 200
    assert {status(trained.path, asked) for asked in ("other", trained.path.parent, ".")} == {404}


def complete(server, **fields) -> tuple[int, dict]:
    """Ask for a completion, or for a chat if there are messages; return status and JSON of the answer."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    asked = {
        "max_tokens": 2,
        "temperature": 0,
        **({} if "messages" in fields else {"prompt": "The"}),
        **fields,
    }
    status, _, text = exchange(server, "POST", path, json.dumps(asked).encode())
    assert "Traceback" not in text
    assert ".py" not in text
    return status, json.loads(text)


# ---- pages of other origins

SENDERS = {
    "rebound name": ("evil.example", []),
    "rebound name with port": ("evil.example:8000", ["Origin: http://evil.example:8000"]),
    "name that ends well": ("evil-localhost", []),
    "name below localhost": ("localhost.evil.example", []),
    "login before the host": ("evil.example@localhost", []),
    "any address": ("0.0.0.0", []),
    "no name": ("", []),
    "other page": ("localhost", ["Origin: http://evil.example"]),
    "other port": ("localhost", ["Origin: http://localhost:1"]),
    "sandboxed page": ("localhost", ["Origin: null"]),
    "second origin": ("localhost", ["Origin: http://localhost", "Origin: http://evil.example"]),
    "cross-site": ("localhost", ["Sec-Fetch-Site: cross-site"]),
    "same-site": ("localhost", ["Sec-Fetch-Site: same-site"]),
}


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/reset", "/load_model", "/health"])
def test_pages_of_other_origins_get_nothing(server, path, sender):
    host, headers = SENDERS[sender]
    method = "GET" if path in ("/v1/models", "/health") else "POST"
    body = b"" if method == "GET" else b'{"prompt": "The", "max_tokens": 1}'
    status, answered, text = exchange(server, method, path, body, *headers, host=host)
    assert status in (400, 403)
    assert "model" not in text
    assert "access-control-allow-origin" not in answered


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"])
def test_programs_of_this_machine_are_answered(server, host):
    assert exchange(server, "GET", "/v1/models", host=host)[0] == 200
    port = server.rsplit(":", 1)[1]
    own = f"localhost:{port}"
    assert exchange(server, "GET", "/v1/models", b"", f"Origin: http://{own}", host=own)[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_simple_requests_are_refused(server, kind):
    """A page may send these types to any server without asking it first."""
    body = b'{"prompt": "The", "max_tokens": 1}'
    headers = (f"Content-Type: {kind}", f"Content-Length: {len(body)}")
    assert exchange(server, "POST", "/v1/completions", body, *headers)[0] == 415
    packed = ("Content-Type: application/json", "Content-Encoding: gzip", f"Content-Length: {len(body)}")
    assert exchange(server, "POST", "/v1/completions", body, *packed)[0] == 415


@pytest.mark.parametrize(
    "path",
    [
        "/reset",
        "/load_model",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/",
        "/v1/responses",
        "/v1/systemone",
        "/v1",
        "/v1/audio/transcriptions",
        "/v1/completions/",
        "//v1/completions",
        "/V1/completions",
        "/../etc/passwd",
        "/v1/%2e%2e/reset",
        "/v1/completions%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_other_paths_are_not_found(server, client, method, path):
    assert exchange(server, method, path, b"" if method == "GET" else b"{}")[0] == 404
    assert client.models.list().data  # nothing was reset


def test_a_connection_does_not_become_a_websocket(server):
    upgrade = (
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert exchange(server, "GET", "/v1/completions", b"", *upgrade)[0] == 404


# ---- requests

REFUSED = {
    "max_tokens": [-1, 0, "x", 1.5, True, 10**30, [], "1"],
    "max_completion_tokens": [0, 10**6],
    "temperature": [-1, "hot", 1e9, [], True],
    "top_p": [0, 1.1, -1, "x"],
    "top_k": [-1, 1.5, 2**70],
    "min_p": [2],
    "repetition_penalty": [0, -1, 1e30],
    "seed": [-1, 2**64, "x"],
    "stream": [1, "yes"],
    "prompt": ["", None, 5, ["a", "b"], [1, 2], {"a": 1}],
    "stop": ["", [""], 5, ["x"] * 17, "x" * 257, [["x"]], {"x": 1}],
    "model": ["", 7, ["x"]],
    "messages": [
        [],
        [{}],
        [{"role": "user"}],
        "hello",
        [{"role": "root", "content": "x"}],
        [7],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "x"}] * 257,
        [{"role": {}, "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [5]}],
        [{"role": "assistant", "content": "x", "tool_calls": []}],
    ],
    "generation_config": [
        "{",
        "[1]",
        '{"num_beams": 300}',
        '{"max_new_tokens": 100000}',
        '{"stop_strings": "a"}',
        {},
    ],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_what_does_not_fit_is_refused_with_its_reason(server, field, value):
    status, answer = complete(server, **{field: value})
    assert status == 400
    message = answer["error"]["message"]
    assert any(word in message for word in (field, "num_beams", "max_new_tokens", "stop_strings", "JSON"))
    assert len(message) < 400


UNSUPPORTED = {
    "n": 3,
    "best_of": 4,
    "logprobs": 2,
    "top_logprobs": 1,
    "echo": True,
    "suffix": "END",
    "logit_bias": {"5": 100},
    "presence_penalty": 1,
    "frequency_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "functions": [],
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": 1},
    "num_beams": 300,
    "prompt_lookup_num_tokens": 3,
    "max_length": 9,
    "audio": {},
    "modalities": ["text"],
    "__class__": "x",
    "\x1b[31m\ud800": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_what_is_not_supported_is_refused_by_name(server, field, kind):
    fields = {"messages": [{"role": "user", "content": "The"}]} if kind == "chat" else {}
    status, answer = complete(server, **fields, **{field: UNSUPPORTED[field]})
    assert status == 400
    message = answer["error"]["message"]
    assert field in message or "surrogate" in message
    assert message.isprintable()


def test_values_that_ask_for_nothing_are_taken(server):
    nothing = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "suffix": None,
        "logit_bias": {},
        "user": "me",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "stream": False,
        "stop": None,
        "seed": None,
    }
    assert complete(server, **nothing)[1]["choices"] == complete(server)[1]["choices"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"1",
        b"null",
        b'"x"',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt":' * 20_000 + b"1" + b"}" * 20_000,
        b"\xef\xbb\xbf{}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_not_json_of_a_request_are_refused(server, body):
    status, _, text = exchange(
        server,
        "POST",
        "/v1/completions",
        body,
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    assert status == 400
    assert json.loads(text)["error"]["message"]


def test_an_unknown_model_is_not_found(server):
    for name in ("/etc/passwd", "gpt2", "trl-lib/model"):
        status, answer = complete(server, model=name)
        assert status == 404
        assert name not in answer["error"]["message"]


def test_a_prompt_longer_than_the_context_is_refused(server):
    status, answer = complete(server, prompt="The value of " * 15_000)
    assert status == 400
    assert "tokens" in answer["error"]["message"]


# ---- sizes and times

LONG = 2**25


def test_a_long_body_is_refused_and_not_held(server):
    body = b'{"prompt": "' + b"a" * LONG + b'"}'
    assert exchange(server, "POST", "/v1/completions", body)[0] == 413
    chunked = b"".join(b"100000\r\n" + b"a" * 2**20 + b"\r\n" for _ in range(LONG // 2**20)) + b"0\r\n\r\n"
    head = request_bytes(
        "POST", "/v1/completions", b"", "Content-Type: application/json", "Transfer-Encoding: chunked"
    )
    assert send_bytes(server, head + chunked).startswith(b"HTTP/1.1 413 ")


def test_a_length_that_is_not_the_bodys_does_not_count(server):
    body = b'{"prompt": "The", "max_tokens": 1}'
    short = request_bytes(
        "POST", "/v1/completions", body, "Content-Type: application/json", "Content-Length: 5"
    )
    assert send_bytes(server, short)[:13] in (b"", b"HTTP/1.1 400 ")
    for length in ("-1", "x", "1, 2", "9" * 30):
        bad = request_bytes(
            "POST", "/v1/completions", b"", "Content-Type: application/json", f"Content-Length: {length}"
        )
        assert b" 200 " not in send_bytes(server, bad + body, timeout_s=15)[:20]


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/comp",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        request_bytes(
            "POST", "/v1/completions", b'{"pro', "Content-Type: application/json", "Content-Length: 9999"
        ),
    ],
)
def test_a_request_that_never_ends_loses_its_connection(server, begun):
    start = time.monotonic()
    answer = send_bytes(server, begun, timeout_s=40)
    assert time.monotonic() - start < 25
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


def test_a_pipelining_client_loses_its_connection(server):
    """uvicorn would not notice that it leaves."""
    body = json.dumps({"prompt": "The", "max_tokens": 4000}).encode()
    request = request_bytes("POST", "/v1/completions", body).replace(b"Connection: close\r\n", b"")
    start = time.monotonic()
    assert b" 200 " not in send_bytes(server, request + request)
    assert time.monotonic() - start < 5


@pytest.fixture(scope="module")
def tokenizer(trained):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained.model)


TEXT = "The value of the object is what the reference says it is. "


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(tokenizer, stream):
    model = ScriptedModel(tokenizer, TEXT * 100, token_s=0.01)
    asked = {"prompt": "The", "max_tokens": 1000, "stream": stream}

    async def run() -> tuple[int, int]:
        app = Server(model, tokenizer, "m", "localhost")
        await call(app, "/v1/completions", asked, leave_after_s=0.2)
        at_leaving = model.n_written
        await asyncio.sleep(0.3)
        return at_leaving, model.n_written

    at_leaving, later = asyncio.run(run())
    assert at_leaving > 3
    assert later <= at_leaving + 2


def test_a_client_that_leaves_the_queue_is_never_run(tokenizer):
    model = ScriptedModel(tokenizer, TEXT, token_s=0.1)

    async def run() -> list:
        app = Server(model, tokenizer, "m", "localhost")
        asked = {"prompt": "The", "max_tokens": 40}
        waiting = [call(app, "/v1/completions", {**asked, "seed": i}, 0.1 if i else None) for i in range(30)]
        return await asyncio.gather(*waiting)

    answers = asyncio.run(run())
    assert answers[0][0]["status"] == 200
    assert answers[1:] == [[]] * 29
    assert len(model.options) == 1


def test_more_requests_than_may_wait_are_told_to_come_again(tokenizer):
    model = ScriptedModel(tokenizer, TEXT, token_s=0.001)

    async def run() -> list:
        app = Server(model, tokenizer, "m", "localhost")
        asked = {"prompt": "The", "max_tokens": 5}
        flood = await asyncio.gather(*(call(app, "/v1/completions", asked) for _ in range(100)))
        return [flood, await call(app, "/v1/completions", asked)]

    flood, later = asyncio.run(run())
    refused = [messages[0] for messages in flood if messages[0]["status"] != 200]
    assert 0 < len(refused) <= 40
    assert all(start["status"] == 503 and dict(start["headers"])[b"retry-after"] for start in refused)
    assert later[0]["status"] == 200


def test_a_model_that_fails_says_nothing_of_its_inside(tokenizer):
    def fail(*_, streamer, **__):
        streamer.put(None)
        raise RuntimeError("/home/me/secret.py is broken")

    async def run(stream: bool) -> bytes:
        model = ScriptedModel(tokenizer, TEXT)
        model.generate = fail
        sent = await call(
            Server(model, tokenizer, "m", "localhost"), "/v1/completions", {"prompt": "The", "stream": stream}
        )
        assert sent[0]["status"] == 500
        return b"".join(message.get("body", b"") for message in sent)

    for stream in (False, True):
        assert b"secret" not in asyncio.run(run(stream))


# ---- text


def answer_of(model, tokenizer, **fields) -> str:
    """The body of the answer to a request for a completion."""
    app = Server(model, tokenizer, "m", "localhost")

    async def ask() -> list[dict]:
        return await call(app, "/v1/completions", {"prompt": "The", **fields})

    return b"".join(message.get("body", b"") for message in asyncio.run(ask())).decode()


def generated(tokenizer, text: str, **fields) -> tuple[str, str, int]:
    """What a client gets of a model that writes `text`, with reason and length; the same in a stream."""
    whole = json.loads(answer_of(ScriptedModel(tokenizer, text), tokenizer, **fields))
    lines = answer_of(ScriptedModel(tokenizer, text), tokenizer, stream=True, **fields).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    said = whole["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in events) == said
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    return said, whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 30])
def test_no_text_from_a_stop_string_on_is_returned(tokenizer, length):
    text = tokenizer.decode(tokenizer(TEXT).input_ids)
    for start in range(1, len(text) - length):
        stop = text[start : start + length]
        said, reason, n_tokens = generated(tokenizer, text, stop=stop)
        assert said == text[: text.index(stop)]
        assert reason == "stop"
        assert n_tokens <= len(tokenizer(text[: text.index(stop) + length]).input_ids) + 1


def test_the_first_of_several_stop_strings_counts(tokenizer):
    text = tokenizer.decode(tokenizer(TEXT).input_ids)
    assert generated(tokenizer, text, stop=["reference", "value of", "object is"])[0] == "The "
    # a beginning that does not become a stop string is part of the text
    assert generated(tokenizer, text, stop=["value of the objection", "says it was"])[0] == text


def test_text_without_a_stop_string_is_whole(tokenizer):
    for text in (TEXT, "Ä, 漢字 and 🙂 are more bytes than one", "🙂"):
        whole = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        said, reason, _ = generated(tokenizer, text)
        assert (said, reason) == (whole, "length")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 1e-30}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        (
            {"generation_config": '{"do_sample": true, "temperature": 0.0, "max_new_tokens": 3}'},
            {"do_sample": False, "max_new_tokens": 3},
        ),
        (
            {"generation_config": '{"top_k": 5, "max_new_tokens": 3}', "max_tokens": 7},
            {"top_k": 5, "do_sample": True, "max_new_tokens": 7},
        ),
    ],
)
def test_settings_reach_generate(tokenizer, fields, expected):
    model = ScriptedModel(tokenizer, TEXT)

    async def run():
        return await call(
            Server(model, tokenizer, "m", "localhost"), "/v1/completions", {"prompt": "The", **fields}
        )

    assert asyncio.run(run())[0]["status"] == 200
    names = {"do_sample", "temperature", "top_p", "top_k", *expected} - {"max_new_tokens"} | expected.keys()
    assert {name: value for name, value in model.options[0].items() if name in names} == expected


def test_a_seed_gives_the_same_text(server):
    sampled = {"max_tokens": 12, "temperature": 1.0}
    first, again, other = (complete(server, seed=seed, **sampled)[1]["choices"] for seed in (1, 1, 2))
    assert first == again != other


def test_learned_positions_bound_prompt_and_continuation(tokenizer):
    model = ScriptedModel(tokenizer, TEXT * 20)
    model.config = type("Config", (), {"position_type": "learned", "max_position_embeddings": 16})

    async def run(prompt):
        asked = {"prompt": prompt, "max_tokens": 100}
        return await call(Server(model, tokenizer, "m", "localhost"), "/v1/completions", asked)

    assert asyncio.run(run(TEXT * 4))[0]["status"] == 400
    n_prompt = len(tokenizer("The").input_ids)
    assert asyncio.run(run("The"))[0]["status"] == 200
    assert model.options[0]["max_new_tokens"] == 16 - n_prompt


def test_a_setting_that_the_server_refuses_ends_the_chat_with_its_reason(server, trained):
    done = subprocess.run(
        [sys.executable, "-m", "hf_genlm", "chat", "--url", server, str(trained.path), "num_beams=4"],
        input="The\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "num_beams" in done.stderr
    assert "Traceback" not in done.stderr
