"What benchmarks/h200.py does without a GPU: which rows there are, that runs are kept apart, and its exact results."
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import h200


def test_rows():
    alone, both = h200.rows(False), h200.rows(True)
    assert len(set(both)) == len(both) and set(alone) < set(both)
    assert {n for n in both if n not in alone} == {n.replace("/kda_lit", "/fla") for n in alone if n.endswith("/kda_lit")}
    assert not set(h200.rows(True, cold=True)) & set(both)


def test_runs_are_never_compared_with_one_another():
    about = dict(device="some GPU", versions={}, copy_bandwidth=4e12)
    ours, peer = "forward/A/bounded/kda_lit", "forward/A/bounded/fla"
    found = h200.merged({}, "monday", about, {ours: dict(ms=1.0), peer: dict(ms=3.0)})
    assert h200.peer_of(ours, found)["ms"] == 3 and h200.line(ours, found).split()[-1] == "3.00"
    found = h200.merged(found, "tuesday", about, {ours: dict(ms=0.5)})
    assert h200.peer_of(ours, found) is None and h200.line(ours, found).split()[-1] == "0.5000"
    assert list(found["runs"]) == ["monday", "tuesday"] and "tuesday: some GPU" in h200.table(found)
    found = h200.merged(found, "tuesday", about, {peer: dict(failed="out of memory")})
    assert list(found["runs"]) == ["tuesday"] and "out of memory" in h200.table(found)


@pytest.mark.parametrize("task, shape, gate", [("forward", "A", "softplus"), ("training", "C", "bounded"), ("decode", "16", "-")])
def test_errors_are_those_of_rounding(task, shape, gate, monkeypatch):
    monkeypatch.setattr(h200, "DEVICE", "cpu")
    monkeypatch.setattr(h200, "SHAPES", {"A": (1, 64, 2), "C": (3, 64, 1)})
    monkeypatch.setattr(h200, "DRAWS", dict.fromkeys(h200.INPUTS, 2))
    h200.exact.cache_clear()
    row, kinds = (task, shape, gate, "kda_lit"), h200.INPUTS if task != "decode" else ("fresh",)
    with torch.set_grad_enabled(task == "training"): found = h200.errors(*row, seed=0)
    assert tuple(found) == kinds and all(0 < e < torch.finfo(torch.bfloat16).eps for e in found.values())
    right = h200.call_of
    monkeypatch.setattr(h200, "call_of", lambda *args: lambda: [1.1 * t for t in right(*args)()])
    if task != "forward": assert 0.09 < h200.error(*row, "fresh", 0) < 0.11
    h200.exact.cache_clear()


def test_a_search_that_is_found_on_disk_is_used(monkeypatch):
    "Kept under the name of a shape, asked for without."
    from types import SimpleNamespace
    import precompile
    from triton.runtime.autotuner import Autotuner
    monkeypatch.setattr(Autotuner, "__init__", Autotuner.__init__)       # what `tune_separately` changes is restored
    monkeypatch.setattr(Autotuner, "check_disk_cache", lambda self, key, *rest: self.cache.update({key: "the best"}))
    monkeypatch.setattr(precompile, "about", ["B"])
    precompile.tune_separately()
    tuner = SimpleNamespace(cache={})
    Autotuner.check_disk_cache(tuner, (128, "bfloat16"), [], None)
    assert tuner.cache[128, "bfloat16"] == tuner.cache[128, "bfloat16", "B"] == "the best"
