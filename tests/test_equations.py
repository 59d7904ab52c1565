"""Is each equation right, and does it say the same in PyTorch and in Triton? Independent references, hard cases included."""
import pytest
import torch

from helpers import distance
from kda_lit import chunk_global_cumsum, chunk_local_cumsum
from kda_lit.cumsum import running_sum, since_start, since_start_bwd, until_end, until_end_bwd

SHAPES = [(2, 2, 64, 128), (1, 1, 32, 60), (3, 1, 16, 100), (2, 64, 256), (1, 64, 1), (0, 2, 64, 16), (2, 0, 8), (2, 64, 0)]


def log_decays(shape, kind):
    "Mild, none at all, or with resets of −500 at every fifth token."
    g = -torch.rand(shape, dtype=torch.float64)
    if kind == "none": return torch.zeros_like(g)
    if kind == "resets": g[..., ::5, :] = -500
    return g


# ---- 01_cumsum

ONES = {since_start: lambda x: x.tril(), until_end: lambda x: x.triu(1),       # what is summed for each token
        since_start_bwd: lambda x: x.triu(), until_end_bwd: lambda x: x.tril(-1)}


@pytest.mark.parametrize("kind", ["mild", "none", "resets"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("f", ONES, ids=lambda f: f.__name__)
def test_sums(backend, f, shape, kind):
    "Every sum keeps its relative precision, next to the largest one as next to the smallest."
    g = backend.rounded(log_decays(shape, kind))
    got = backend(f, g).double().cpu()
    want = (ONES[f](torch.ones(shape[-2], shape[-2]).double())[..., None] * g[..., None, :, :]).sum(-2)
    assert got.shape == want.shape and ((got - want).abs() <= 8 * backend.eps * want.abs()).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 150, 60), (1, 1, 3), (1, 64, 64), (1, 200, 70)], ids=str)
def test_running_sum(backend, shape, reverse):
    "Over any length; and over the transpose of a tensor, whose rows do not lie one behind the other."
    x = backend.rounded(torch.randn(*shape[:-2], shape[-1], shape[-2])).mT
    want = x.flip(-2).cumsum(-2).flip(-2) if reverse else x.cumsum(-2)
    assert distance(backend(running_sum, x, reverse).cpu(), want) < 16 * backend.eps


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("channels", [(), (5,)], ids=["a head", "a channel"])
def test_cumulative_sums(backend, channels, head_first):
    "The operators around it: packed sequences, one of them empty, and both layouts."
    lens = [3, 0, 70, 1]
    g = backend.rounded(torch.randn(1, sum(lens), 2, *channels))
    parts, turn = g.split(lens, 1), lambda x: x.transpose(1, 2) if head_first else x
    cu_seqlens = torch.tensor([0, 3, 3, 73, 74])
    local = torch.cat([c.cumsum(1) for part in parts for c in part.split(32, 1)], 1)
    whole = torch.cat([part.flip(1).cumsum(1).flip(1) for part in parts], 1)
    options = dict(cu_seqlens=cu_seqlens, head_first=head_first, output_dtype=None)
    got = backend(chunk_local_cumsum, turn(g), 32, scale=0.5, **options)
    assert distance(turn(got).cpu(), 0.5 * local) < 8 * backend.eps
    got = backend(chunk_global_cumsum, turn(g), reverse=True, **options)
    assert distance(turn(got).cpu(), whole) < 16 * backend.eps
