"""One thread, which is quickest for small tensors; one seed, so that every run gives the same answer; both backends."""
import os
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from kda_lit.utils import interpret_without_gpu, use_backend

interpret_without_gpu()                                              # before anything imports Triton
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # what deterministic algorithms ask for
torch.set_num_threads(1)
settings.register_profile("kda_lit", derandomize=True, deadline=None, max_examples=25,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("kda_lit")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Backend(NamedTuple):
    """Who computes, and in what. Called like `backend(f, x, …)` it gives what `f` makes of its arguments there; what is
    allocated meanwhile is filled with NaN, so that a number that a kernel forgets to write is seen."""
    name: str
    dtype: torch.dtype

    @property
    def eps(self): return torch.finfo(self.dtype).eps

    def put(self, x):
        "Float tensors in the dtype and on the device of this backend, also inside a dictionary or a tuple."
        if isinstance(x, dict): return {name: self.put(t) for name, t in x.items()}
        if isinstance(x, tuple): return tuple(map(self.put, x))
        if not isinstance(x, torch.Tensor): return x
        return x.to(DEVICE, self.dtype if x.is_floating_point() else None)

    def rounded(self, x):
        "The numbers that arrive there, in float64 and on the CPU, for the computation to compare with."
        return self.put(x).to("cpu", torch.float64)

    def __call__(self, f, *args, **kwargs):
        with use_backend(self.name): return f(*self.put(args), **self.put(kwargs))


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TORCH = [Backend("torch", F64), Backend("torch", F32)]
TRITON = [Backend("triton", F32)]                                    # all that the interpreter can
HALF = [Backend(name, dtype) for name in ("torch", "triton")[:1 + (DEVICE == "cuda")] for dtype in (BF16, F16)]


@pytest.fixture(params=TORCH + TRITON, ids=lambda b: f"{b.name}-{b.dtype}".replace("torch.", ""))
def backend(request):
    "Every backend, in the dtypes that equations are computed in."
    yield from poisoned(request.param)


@pytest.fixture(params=TORCH + TRITON + HALF, ids=lambda b: f"{b.name}-{b.dtype}".replace("torch.", ""))
def every_backend(request):
    "Every backend, in the dtypes that operators accept."
    yield from poisoned(request.param)


def poisoned(backend):
    "PyTorch's deterministic mode fills new memory with NaN."
    if backend.name == "triton" and find_spec("triton") is None: pytest.skip("Triton is not installed")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield backend
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)
