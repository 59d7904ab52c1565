"""Is each equation right, and does it say the same in PyTorch and in Triton? Independent references, hard cases included."""
import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICE
from helpers import borders, distance
from kda_lit import chunk_global_cumsum, chunk_local_cumsum, fused_kda_gate, kda_gate_bwd, kda_gate_fwd, l2norm, l2norm_bwd, \
    l2norm_fwd, solve_tril
from kda_lit.cumsum import running_sum, since_start, since_start_bwd, until_end, until_end_bwd
from kda_lit.solve_tril import unit_lower_inverse, unit_lower_inverse_bwd
from kda_lit.utils import compute_dtype

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
    local = torch.cat([c.cumsum(1) for part in parts for c in part.split(32, 1)], 1)
    whole = torch.cat([part.flip(1).cumsum(1).flip(1) for part in parts], 1)
    options = dict(cu_seqlens=borders(lens), head_first=head_first, output_dtype=None)
    got = backend(chunk_local_cumsum, turn(g), 32, scale=0.5, **options)
    assert distance(turn(got).cpu(), 0.5 * local) < 8 * backend.eps
    got = backend(chunk_global_cumsum, turn(g), reverse=True, **options)
    assert distance(turn(got).cpu(), whole) < 16 * backend.eps


# ---- 02_solve_tril

def overlaps(shape, kind):
    "β k kᵀ below the diagonal, for unit keys: random ones, nearly the same ones, or exactly the same ones with β = 2."
    keys = F.normalize((0 if kind == "equal" else torch.randn(*shape, 32)) * (0.01 if kind == "close" else 1)
                       + (0 if kind == "random" else torch.ones(*shape, 32)), dim=-1).double()
    return ((2 if kind == "equal" else 1) * keys @ keys.mT).tril(-1)


@pytest.mark.parametrize("kind", ["random", "close", "equal"])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 32), (2, 16), (0, 2, 64)], ids=str)
def test_inverse(backend, shape, kind):
    "By what it is for, and by forward substitution; what stands above the diagonal is not read. β = 2 amplifies rounding."
    A = backend.rounded(overlaps(shape, kind))
    X = backend(unit_lower_inverse, A + torch.randn(A.shape).triu()).double().cpu()
    I = torch.eye(shape[-1]).double().expand_as(A)
    tol = (512 if kind == "equal" else 64) * backend.eps
    assert distance(X, torch.linalg.solve_triangular(I + A, I, upper=False)) < tol
    assert (((I + A) @ X - I).abs() <= tol * (I + A).abs() @ X.abs()).all()


@pytest.mark.parametrize("kind", ["random", "close"])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 32), (2, 16), (0, 2, 64)], ids=str)
def test_inverse_gradient(backend, shape, kind):
    "Against autograd through a general inverse."
    A = overlaps(shape, kind).requires_grad_()
    X, dX = torch.linalg.inv(torch.eye(shape[-1]).double() + A), torch.randn(A.shape).double()
    want, = torch.autograd.grad(X, A, dX)
    assert distance(backend(unit_lower_inverse_bwd, X.detach(), dX).cpu(), want.tril(-1)) < 64 * backend.eps


@pytest.mark.parametrize("C", [16, 32, 64])
def test_solve_tril(every_backend, C):
    "Packed sequences, and the gradient; the last chunk of each sequence is shorter."
    lens = [3, 0, C + 5, 1]
    chunks = lambda A: [part for sequence in A[0].split(lens) for part in sequence.split(C)]    # [n, H, C] each
    A = torch.cat([F.pad(overlaps((2, len(x)), "random"), (0, C - len(x))).transpose(0, 1)
                   for x in chunks(torch.ones(1, sum(lens)))])[None]
    A, dX = every_backend.rounded(A).requires_grad_(), every_backend.rounded(torch.randn(A.shape))
    square = lambda x: x.transpose(0, 1)[..., :len(x)].tril(-1)
    inverse = lambda x: F.pad(torch.linalg.inv(torch.eye(len(x)).to(x) + square(x)), (0, C - len(x))).transpose(0, 1)
    want = torch.cat([inverse(x) for x in chunks(A)])[None]
    X = every_backend(solve_tril, A, cu_seqlens=borders(lens), output_dtype=every_backend.dtype)
    assert distance(X.cpu(), want) < 64 * every_backend.eps
    dA, = torch.autograd.grad(X, A, every_backend.put(dX))
    assert distance(dA, torch.autograd.grad(want, A, dX)[0]) < 64 * every_backend.eps


# ---- 03_l2norm

def rows(shape):
    "Long rows, short ones, one of zeros."
    x = torch.randn(shape).double() * torch.logspace(-2, 3, shape[0]).double().view(-1, *[1] * (len(shape) - 1))
    x[:1] = 0
    return x


@pytest.mark.parametrize("shape", [(7, 3, 60), (70, 128), (3, 1), (2, 300), (0, 5), (3, 0)], ids=str)
def test_l2norm(every_backend, shape):
    "Gradients by the function of their own, and by autograd; they are a difference, of terms as large as rstd · dy."
    x, dy = every_backend.rounded(rows(shape)).requires_grad_(), every_backend.rounded(torch.randn(shape))
    r = 1 / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    want, = torch.autograd.grad(x * r, x, dy)
    y, rstd = every_backend(l2norm_fwd, x.detach())
    assert y.dtype == every_backend.dtype and rstd.dtype == compute_dtype(y)
    assert distance(y.cpu(), x * r) < 8 * every_backend.eps and distance(rstd.cpu(), r[..., 0]) < 8 * every_backend.eps
    by_hand = every_backend(lambda y, dy: l2norm_bwd(y, rstd, dy), (x * r).detach(), dy)
    by_autograd, = torch.autograd.grad(every_backend(l2norm, x), x, every_backend.put(dy))
    for got in (by_hand, by_autograd):
        assert ((got.cpu() - want).abs() <= 8 * every_backend.eps * r * dy.norm(dim=-1, keepdim=True)).all()


# ---- 06_gate

@pytest.mark.parametrize("lower_bound, A, bias", [(None, True, True), (None, True, False), (-5.0, True, True), (-5.0, False, False)])
@pytest.mark.parametrize("shape", [(2, 35, 3, 20), (1, 1, 2, 128), (70, 1, 100), (0, 2, 16)], ids=str)
def test_gate(every_backend, shape, lower_bound, A, bias):
    "With gradients; raw gates from far below zero, where softplus keeps its digits, to far above."
    H, K = shape[-2:]
    z = 6 * torch.randn(*shape[:-2], H * K)
    if z.numel() > 8: z.view(-1)[:8] = torch.tensor([-500., -90, -30, -10, 19.9, 20.1, 90, 500])
    z, dy = every_backend.rounded(z).requires_grad_(), every_backend.rounded(torch.randn(shape))
    A, bias = (every_backend.rounded(torch.rand(n)).requires_grad_() if given else None for n, given in ((H, A), (H * K, bias)))
    x = (z if bias is None else z + bias).unflatten(-1, (H, K))
    rate = 1 if A is None else A.exp()[:, None]
    softplus = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    want = -rate * softplus if lower_bound is None else lower_bound * torch.sigmoid(rate * x)
    leaves = [t for t in (z, A, bias) if t is not None]
    got = every_backend(fused_kda_gate, z, A, K, bias, lower_bound=lower_bound)
    assert got.dtype == (torch.float64 if every_backend.dtype == torch.float64 else torch.float32)
    close = max(8 * torch.finfo(got.dtype).eps, 4e-9)                  # the threshold of 20 leaves out e^−20
    assert distance(got.cpu(), want) < close
    if lower_bound is None: assert ((got.cpu() - want).abs() <= 1e-4 * want.abs() + 1e-30).all()
    grads = torch.autograd.grad(got, leaves, dy.to(got.device, got.dtype))
    for a, b in zip(grads, torch.autograd.grad(want, leaves, dy)):
        assert distance(a.cpu(), b) < max(64 * every_backend.eps, close)


# ---- offsets

ROOM = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory > 40e9
LARGE = {
    "sums": (since_start, (64, 128)), "inverse": (unit_lower_inverse, (64, 64)),
    "l2norm": (lambda x: l2norm_fwd(x)[0], (64, 128)), "gate": (lambda z: kda_gate_fwd(z, None, 128, lower_bound=-5.)[0], (64, 128)),
}


@pytest.mark.skipif(not ROOM, reason="needs a GPU with 40 GB")
@pytest.mark.parametrize("name", LARGE)
def test_more_numbers_than_int32_can_count(name):
    f, shape = LARGE[name]
    x = torch.randn(2**31 // (shape[0] * shape[1]) + 2, *shape, device="cuda")
    assert torch.equal(f(x)[-3:], f(x[-3:].clone()))
