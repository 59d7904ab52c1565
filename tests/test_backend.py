"""Which backend runs, what is said when the one that was asked for cannot, and are there numbers that nobody wrote?"""
import threading

import pytest
import torch

from conftest import DEVICE
from kda_lit import dispatch, keep_backend, use_backend
from kda_lit.cumsum import since_start
from test_import import fresh

G = -torch.rand(1, 1, 16, 8)
CPU = "import torch; from kda_lit import use_backend; from kda_lit.cumsum import since_start; g = -torch.rand(1, 1, 16, 8)"
FORCED = """
try:
    with use_backend("triton"): since_start(g)
except RuntimeError as e: print(e)
"""


@dispatch
def who(x): return "torch"


def who_triton(x): return "triton"


def test_by_device():
    assert who(G) == who(G.double()) == "torch"
    with use_backend("torch"): assert who(G.to(DEVICE)) == "torch"
    if DEVICE == "cuda":
        assert who(G.cuda()) == "triton" and who(G.cuda().double()) == who(G.cuda().requires_grad_()) == "torch"
    with use_backend("triton"):
        assert who(G.to(DEVICE)) == "triton"
        with use_backend(None): assert who(G) == "torch"
    assert who.torch(G) == "torch"


@pytest.mark.parametrize("x, words", [
    (G.double(), "float64"), (G.clone().requires_grad_(), "no_grad"),
    pytest.param(G.bfloat16(), "convert", marks=pytest.mark.skipif(DEVICE == "cuda", reason="a GPU computes it")),
    pytest.param(G, "CUDA", marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes it")),
], ids=["float64", "autograd", "half precision", "on the CPU"])
def test_forced_and_impossible(x, words):
    on = x.device if words == "CUDA" else DEVICE
    x = x.detach().to(on).requires_grad_(x.requires_grad)
    with use_backend("triton"), pytest.raises(RuntimeError) as caught: since_start(x)
    assert "`since_start`" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("start, words", [
    ("import sys; sys.modules['triton'] = None", "pip install triton"),
    ("import os; os.environ['TRITON_INTERPRET'] = '0'", "TRITON_INTERPRET=1 before"),
    ("import os; os.environ['TRITON_INTERPRET'] = '0'\nimport triton\nos.environ['TRITON_INTERPRET'] = '1'", "TRITON_INTERPRET=1 before"),
], ids=["not installed", "not interpreted", "interpreted too late"])
def test_forced_without_a_gpu_or_without_triton(start, words):
    said = fresh(f"{start}\n{CPU}\n{FORCED}")
    assert "`since_start`" in said and words in said


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_interpreted_at_the_last_moment():
    said = fresh(f"{CPU}\nimport os; os.environ['TRITON_INTERPRET'] = '1'\n"
                 "with use_backend('triton'): print((since_start(g) - g.cumsum(2)).abs().max().item() < 1e-5)")
    assert said.strip() == "True"


def test_the_first_call_imports_triton_and_no_earlier():
    said = fresh(f"import sys\n{CPU}\nsince_start(g)\nprint('triton' in sys.modules, 'kda_lit.kernels' in sys.modules)")
    assert said.strip() == "False False"


@keep_backend
class Ask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, dx): return torch.full_like(dx, who(dx) == "triton")


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_backward_as_forward(name):
    "Also in another thread, where autograd walks back through CUDA tensors."
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with use_backend(name): y = Ask.apply(x).sum()
    walk = threading.Thread(target=y.backward)
    walk.start(), walk.join()
    assert (x.grad == (name == "triton")).all()


def test_memory_is_poisoned(backend):
    "So that `distance` is infinite where a kernel leaves a hole."
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.empty_like(G).isnan().all()
