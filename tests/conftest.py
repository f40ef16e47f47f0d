"""What several promises need: small models of every kind, with weights that make a difference."""

import gc
import os
import signal

# before torch is imported: no test may reach for a network, and a worker among others has one core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# a session that was started in the background ignores Ctrl-C, and its programs would do so too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from support import upstream
from support.models import STACKS, VOCAB, build_model

from hf_genlm.model import GenLMForCausalLM

pytest_plugins = ["support.runs", "support.command_line", "support.pictures"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What tests keep is neither found by other sessions nor left in the home of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_GENLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_but_new_garbage():
    """What is imported by now stays: a search there too takes half a second, and each training searches."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(params=STACKS)
def model(request) -> GenLMForCausalLM:
    return build_model(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 12) random ids without pad and end of text."""
    return torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """transformers' own tests skip what they take a model not to have: only for reasons that we know."""
    report = yield
    if item.path.name == "test_upstream.py" and report.skipped and not upstream.may_skip(report.longrepr[2]):
        report.outcome, report.longrepr = "failed", f"skipped for an unknown reason: {report.longrepr[2]}"
    return report
