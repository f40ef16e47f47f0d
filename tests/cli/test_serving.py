"""Promise: a saved model is served by an OpenAI-compatible API, and `chat` talks to it."""

import contextlib
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support.command_line import last_line

from hf_genlm.cli.main import main
from hf_genlm.serving import LIBRARIES, background_server

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


def test_a_server_that_cannot_start_says_why(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "no model at" in last_line(capsys)
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows-this"}')
    assert main(["chat", str(tmp_path)]) == 2
    assert "no weights in model.safetensors" in last_line(capsys)
    (tmp_path / "model.safetensors").touch()
    assert main(["chat", str(tmp_path)]) == 2
    assert "did not start" in last_line(capsys)
