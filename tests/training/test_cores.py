"""Promise: no more threads compute than the container may use."""

import math
import os

import pytest
import torch
from support.corpora import write

from hf_genlm import run_folder
from hf_genlm.cli.main import main
from hf_genlm.run_folder import _cpu_quotas, describe_environment, n_cores
from hf_genlm.training import processes


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b.slice\n", {"a/b.slice/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),
        ("1:name=systemd:/\n0::/\n", {"unified/cpu.max": "400000 100000"}, [4]),
        ("4:cpu,cpuacct:/docker/x\n3:cpuset:/\n", {
            "cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, [2]),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, []),
        ("0::/\n", {"cpu.max": "what is this"}, []),
        ("0::/../b\n", {}, []),
    ],
)  # fmt: skip
def test_quotas_of_both_versions_are_read(tmp_path, groups, files, quotas):
    for name, content in files.items():
        write(tmp_path / "mounts" / name, f"{content}\n")
    found = list(_cpu_quotas(str(write(tmp_path / "cgroup", groups)), str(tmp_path / "mounts")))
    assert sorted(set(found)) == quotas
    assert list(_cpu_quotas(str(tmp_path / "missing"))) == []


def test_a_quota_bounds_the_cores_and_the_threads(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quotas, wanted in (([], 64), ([1.5, 8], 2), ([0.1], 1), ([1000], 64), ([math.inf], 64)):
        monkeypatch.setattr(run_folder, "_cpu_quotas", lambda quotas=quotas: iter(quotas))
        assert n_cores() == describe_environment()["cpu_count"] == wanted
    monkeypatch.setattr(run_folder, "_cpu_quotas", lambda: iter([2]))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        for n_threads, stated, wanted in ((8, None, 2), (1, None, 1), (1, 4, 4)):
            torch.set_num_threads(n_threads)
            processes.set_threads(stated)
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)
    assert main(["--version"]) == 0
    assert os.environ.pop("OMP_NUM_THREADS") == "2"
