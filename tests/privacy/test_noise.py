"""Promise: the randomness of a private run is independent over tensors, chunks, purposes and steps."""

import hashlib
import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.independence import dependent_pairs

from hf_genlm.privacy import mechanism
from hf_genlm.privacy.mechanism import (
    Guarantee,
    chacha20_stream,
    chacha20_words,
    draw_documents,
    draw_fast_noise,
    draw_gaussians,
    draw_offsets,
    draw_secure_noise,
)
from hf_genlm.text.encoding import TokenizedDocuments
from hf_genlm.text.packing import DocumentWindows
from hf_genlm.training.private import DrawnSteps, PrivateState

KEY = bytes(range(32))
CPU = torch.device("cpu")
CHUNK = 1 << 20
STEPS = (0, 1, 2, 255, 256, 65536, 2**32)
# the last two are those of a GPU, computed on a CPU
SOURCES = {
    "Philox": draw_fast_noise,
    "SHAKE-256": draw_secure_noise,
    "ChaCha20": partial(draw_gaussians, num_summands=1, draw_words=chacha20_words),
    "ChaCha20, sums of four": partial(draw_gaussians, num_summands=4, draw_words=chacha20_words),
}


def noise_of(source: str, key: bytes = KEY, step: int = 0, shapes=((5000,),)) -> list[np.ndarray]:
    return [part.numpy() for part in SOURCES[source](key, step, list(shapes), device=CPU)]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_standard_gaussians(source):
    from scipy import stats

    (noise,) = noise_of(source, shapes=[(60_001,)])
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    pairs = noise[:60_000].reshape(2, -1)
    assert dependent_pairs({"first half": pairs[0], "second half": pairs[1]}) == []
    assert dependent_pairs({"odd": noise[1::2], "even": noise[::2]}) == []


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_independent_over_tensors(source):
    shapes = [(50, 100), (5000,), (5000,), (100, 50), (1, 1), (3, 10, 200)]
    parts = noise_of(source, shapes=shapes)
    assert [part.shape for part in parts] == shapes
    named = {f"{i}": part for i, part in enumerate(parts) if part.size > 1}
    assert dependent_pairs(named) == []


@pytest.mark.parametrize("source", ["Philox", "SHAKE-256", "ChaCha20"])
def test_noise_is_independent_over_chunks(source):
    """Within a tensor, and where a tensor ends beside a chunk."""
    first, second = noise_of(source, shapes=[(CHUNK + 5000,), (5000,)])
    parts = {"0": first[:5000], "1": first[CHUNK:], "end of 0": first[CHUNK - 5000 : CHUNK], "tensor": second}
    assert dependent_pairs(parts) == []


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_independent_over_steps_and_keys(source):
    parts = {f"step {step}": noise_of(source, step=step)[0] for step in STEPS}
    for i, place in enumerate((0, 15, 31)):  # one bit of the key
        key = bytearray(KEY)
        key[place] ^= 1
        parts[f"key {i}"] = noise_of(source, key=bytes(key))[0]
    assert dependent_pairs(parts) == []
    assert np.array_equal(noise_of(source)[0], parts["step 0"]), "it follows from key and step"


@pytest.mark.parametrize("source", SOURCES)
def test_documents_windows_and_noise_are_independent(source):
    n = 5000
    parts = {"noise": noise_of(source, shapes=[(n,)])[0]}
    parts |= {f"windows of step {step}": draw_offsets(KEY, step, n) / 2.0**64 for step in STEPS}
    for step in STEPS:
        parts[f"documents of step {step}"] = np.isin(np.arange(n), draw_documents(KEY, step, n, 0.1))
    # an indicator shares its two values with every other
    found = [pair for pair in dependent_pairs(parts) if pair[2] != "shared values" or "windows" in pair[0]]
    assert found == []
    squares = {name: values**2 if name == "noise" else values for name, values in parts.items()}
    assert [pair for pair in dependent_pairs(squares) if "noise" in pair[:2]] == [], "the size of the noise"
    seed = draw_offsets(KEY, 0, 2)  # if windows and Philox had one stream
    assert not np.array_equal(
        np.random.Generator(np.random.Philox(key=seed)).standard_normal(n, dtype=np.float32), parts["noise"]
    )


def test_no_two_streams_have_one_origin(monkeypatch):
    """Every use of the key hashes an input of its own."""
    inputs: list[bytes] = []

    def record(text: bytes):
        inputs.append(text)
        return hashlib.shake_256(text)

    monkeypatch.setattr(mechanism, "hashlib", SimpleNamespace(shake_256=record))
    for step in STEPS:
        draw_documents(KEY, step, 10, 0.5)
        draw_offsets(KEY, step, 10)
        for source in ("Philox", "SHAKE-256", "ChaCha20"):
            noise_of(source, step=step, shapes=[(10,)])
    monkeypatch.setattr(mechanism, "_CHUNK_SIZE", 16)
    for source in ("SHAKE-256", "ChaCha20"):
        noise_of(source, step=3, shapes=[(40,), (40,)])
    assert len(inputs) == 5 * len(STEPS) + 2 * 5
    assert len(set(inputs)) == len(inputs)
    assert all(text.startswith(KEY) for text in inputs)


def test_a_step_draws_other_documents_and_windows_than_another():
    """Of the batches that Trainer gets: which documents, and where in them."""
    n, length = 60, 300
    ids = np.tile(np.arange(10, 10 + length, dtype=np.uint16), n)
    windows = DocumentWindows(
        TokenizedDocuments(ids, np.arange(n + 1) * length, np.full(n, length)), 4, eos_id=1, pad_id=0
    )
    all_of_them = Guarantee(1.0, 1e-4, 1.0, 1.0, 1.0, n, 50, False)
    steps = DrawnSteps(windows, PrivateState(all_of_them, KEY))
    starts = {f"step {step}": steps[step]["input_ids"][:, 1].numpy() for step in range(50)}
    assert all(len(found) == n for found in starts.values())
    assert np.std(list(starts.values()), axis=0).min() > 40, "uniform over 300 places: 87"
    assert np.std(list(starts.values()), axis=1).min() > 40, "and not one place for all documents"
    assert [pair for pair in dependent_pairs(starts) if pair[2] != "shared values"] == []

    half = Guarantee(1.0, 1e-4, 0.5, 1.0, 1.0, n, 50, False)
    drawn = [tuple(draw_documents(KEY, step, n, 0.5)) for step in range(50)]
    assert len(set(drawn)) == 50
    sizes = [len(DrawnSteps(windows, PrivateState(half, KEY))[step]["input_ids"]) for step in range(50)]
    assert sizes == [len(found) for found in drawn]


# ChaCha20


def test_chacha20_gives_the_key_streams_of_the_rfc():
    """RFC 8439, appendix A.1: vectors 1 and 2, 3, and 4 at blocks 0 to 2."""
    zero = chacha20_stream(bytes(32), 32).numpy().tobytes().hex()
    assert zero == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    one = chacha20_stream(bytes(31) + b"\x01", 32).numpy().tobytes().hex()
    assert one[128:] == (
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
    )
    long = chacha20_stream(b"\x00\xff" + bytes(30), 48).numpy().tobytes().hex()
    assert long[256:] == (
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"
    )
    assert chacha20_stream(KEY, 5).tolist() == chacha20_stream(KEY, 100)[:5].tolist()


@pytest.mark.parametrize(("draw", "num_summands"), [(draw_fast_noise, 1), (draw_secure_noise, 4)])
def test_noise_on_a_gpu_is_from_chacha20_with_all_bits_of_the_key(draw, num_summands, monkeypatch):
    seen = []
    monkeypatch.setattr(mechanism, "draw_gaussians", lambda *args: seen.append(args))
    draw(KEY, 3, [(2,)], torch.device("cuda"))
    assert seen == [(KEY, 3, [(2,)], torch.device("cuda"), num_summands, chacha20_words)]
    assert "manual_seed" not in inspect.getsource(mechanism), "torch's generators have seeds of 64 bits"
    keys = []
    monkeypatch.setattr(
        mechanism,
        "chacha20_stream",
        lambda key, n, device: keys.append(key) or torch.zeros(n, dtype=torch.int32),
    )
    for step in range(3):
        chacha20_words(KEY, step, 0, 2, CPU)
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {32}
