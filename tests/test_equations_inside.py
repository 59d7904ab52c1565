"""Inside one chunk and across its border: scores, WY vectors, their gradients, in PyTorch and in Triton."""
import pytest
import torch
import torch.nn.functional as F

from helpers import borders, distance
from kda_lit import (chunk_kda_bwd_dqkwg, chunk_kda_bwd_intra, chunk_kda_fwd_intra, chunk_local_cumsum, prepare_wy_repr_bwd,
                     recompute_w_u_fwd, to_chunks)
from kda_lit.chunk_inter import inter_chunk_bwd
from kda_lit.chunk_intra import chunk_scores, intra_chunk_bwd
from kda_lit.wy_fast import wy_vectors, wy_vectors_bwd

F64 = torch.float64
SIZES = [(64, 128, 60), (32, 60, 100), (16, 256, 17), (64, 1, 256), (16, 17, 1)]       # C, K, V
STEPS = torch.tensor([0, -0.01, -1, -80, -500], dtype=F64)
DECAYS = {**{f"{x:g}": lambda shape, x=x: torch.full(shape, x, dtype=F64) for x in STEPS.tolist()},
          "mixed": lambda shape: STEPS[torch.randint(5, shape)], "mild": lambda shape: -torch.rand(shape, dtype=F64)}


def normal(*shape): return torch.randn(shape, dtype=F64)


def unit(*shape): return F.normalize(normal(*shape), dim=-1)


def close(got, want, tol):
    for a, b in zip(got, want, strict=True): assert distance(a.cpu(), b) < tol


def rounded(backend, *tensors): return [backend.rounded(x) for x in tensors]


# ---- 10_chunk_intra

def pairs(a, k, g):
    "Σ_c a_ic k_jc e^(g summed from j+1 to i) for i ≥ j, each sum for itself."
    C = g.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool).tril(-1)[..., None]                      # i > j
    sums = torch.where(later, g[..., :, None, :], 0).cumsum(-3)
    return torch.einsum("...ic,...jc,...ijc->...ij", a, k, sums.exp()).tril()


def both_scores(q, k, g, beta, scale): return scale * pairs(q, k, g), beta[..., None] * pairs(k, k, g).tril(-1)


@pytest.mark.parametrize("C, K, kind", [(C, K, "mixed") for C, K, _ in SIZES] + [(32, 20, kind) for kind in DECAYS], ids=str)
def test_scores_and_their_gradient(backend, C, K, kind):
    "Both matrices and all four gradients. Sums over a few hundred products of unit vectors' channels."
    q, k, g, beta = rounded(backend, unit(2, 1, C, K), unit(2, 1, C, K), DECAYS[kind]((2, 1, C, K)), torch.rand(2, 1, C))
    x = [t.requires_grad_() for t in (q, k, g, beta)]
    want, dA = both_scores(*x, 0.3), rounded(backend, normal(2, 1, C, C), normal(2, 1, C, C))
    grads = torch.autograd.grad(want, x, dA)
    x = [t.detach() for t in x]
    close(backend(chunk_scores, *x, 0.3), want, 16 * backend.eps)
    close(backend(intra_chunk_bwd, *x, 0.3, *dA), grads, 32 * backend.eps)


def test_scores_of_no_chunks(backend):
    q, beta, dA = torch.zeros(0, 2, 32, 8), torch.zeros(0, 2, 32), torch.zeros(0, 2, 32, 32)
    assert [x.shape for x in backend(chunk_scores, q, q, q, beta, 1.0)] == [dA.shape] * 2
    shapes = [x.shape for x in backend(intra_chunk_bwd, q, q, q, beta, 1.0, dA, dA)]
    assert shapes == [q.shape] * 3 + [beta.shape]


PACK, C = [3, 0, 37, 1], 32


def token_inputs(backend, H=1, HV=2, K=12, V=20):
    "q, k, v, g, beta and G of a ragged pack."
    T = sum(PACK)
    q, k, v, g, beta = rounded(backend, unit(1, T, H, K), unit(1, T, H, K), normal(1, T, HV, V),
                               -torch.rand(1, T, HV, K), torch.rand(1, T, HV))
    return q, k, v, g, beta, backend.rounded(chunk_local_cumsum(g, C, cu_seqlens=borders(PACK), output_dtype=F64))


def test_operators_of_the_scores(backend):
    "Forward against the sums over pairs, sequence by sequence; backward adds to what is handed in."
    q, k, _, g, beta, G = token_inputs(backend)
    options = dict(cu_seqlens=borders(PACK), chunk_size=C)
    Aqk, Akk = (x.cpu() for x in backend(chunk_kda_fwd_intra, q, k, G, beta, 0.5, output_dtype=backend.dtype, **options))
    part = slice(3, 3 + C)
    args = [x.expand(1, -1, 2, -1)[0, part].transpose(0, 1) for x in (q, k, g)]
    want, L = both_scores(*args, beta[0, part].T, 0.5)
    assert distance(Aqk[0, part].transpose(0, 1), want) < 32 * backend.eps
    assert distance(Akk[0, part].transpose(0, 1), torch.linalg.inv(torch.eye(C) + L)) < 64 * backend.eps

    x = [t.detach().requires_grad_() for t in (q.expand(1, -1, 2, -1), k.expand(1, -1, 2, -1), beta, G)]
    dAqk, dL, *before = rounded(backend, normal(*Aqk.shape), normal(*Aqk.shape), *(normal(*t.shape) for t in x))
    cut = lambda t: to_chunks(t, borders(PACK), C)
    loss = sum((A * cut(dA)).sum() for A, dA in zip(both_scores(*map(cut, (*x[:2], g, beta)), 1.0), (dAqk, dL)))
    grads = torch.autograd.grad(loss, x[:2])
    got = backend(chunk_kda_bwd_intra, *(t.detach() for t in (*x[:2], G, beta)), dAqk, dL, *before, **options)
    close(got[:2], [a + b for a, b in zip(before, grads)], 64 * backend.eps)
    summed = chunk_local_cumsum(got[3].cpu() - backend.put(before[3]).cpu(), C, True, cu_seqlens=borders(PACK), output_dtype=F64)
    leaves = [t.detach().requires_grad_() for t in (g, beta)]
    loss = sum((A * cut(dA)).sum() for A, dA in zip(both_scores(cut(x[0]), cut(x[1]), *map(cut, leaves), 1.0), (dAqk, dL)))
    dg, dbeta = torch.autograd.grad(loss, leaves)
    assert distance(summed, dg) < 256 * backend.eps and distance(got[2].cpu(), before[2] + dbeta) < 64 * backend.eps


# ---- 11_wy_fast

def some_inverse(C): return torch.linalg.inv(torch.eye(C).double() + (normal(3, 1, C, C) / C).tril(-1))


@pytest.mark.parametrize("C, K, V", SIZES, ids=str)
def test_wy_vectors_and_their_gradient(backend, C, K, V):
    ke, v, beta, A, dw, du = rounded(backend, normal(3, 1, C, K), normal(3, 1, C, V), torch.rand(3, 1, C), some_inverse(C),
                                     normal(3, 1, C, K), normal(3, 1, C, V))
    x = [t.requires_grad_() for t in (ke, v, beta, A)]
    want = [torch.einsum("nhij,nhj,nhjc->nhic", A, beta, t) for t in (ke, v)]
    grads = torch.autograd.grad(want, x, (dw, du))
    x = [t.detach() for t in x]
    close(backend(wy_vectors, *x), want, 16 * backend.eps)
    close(backend(wy_vectors_bwd, *x, dw, du), grads, 32 * backend.eps)


def test_wy_vectors_of_no_chunks(backend):
    ke, beta, A = torch.zeros(0, 2, 32, 8), torch.zeros(0, 2, 32), torch.zeros(0, 2, 32, 32)
    assert [x.shape for x in backend(wy_vectors, ke, ke, beta, A)] == [ke.shape] * 2
    shapes = [x.shape for x in backend(wy_vectors_bwd, ke, ke, beta, A, ke, ke)]
    assert shapes == [ke.shape, ke.shape, beta.shape, A.shape]


def test_operators_of_the_wy_vectors(backend):
    "Against autograd through the solve, on a ragged pack."
    q, k, v, g, beta, G = token_inputs(backend, H=2)
    cut = lambda t: to_chunks(t, borders(PACK), C)
    leaves = [t.requires_grad_() for t in (k, v, beta, G)]
    ks, vs, bs, Gs = map(cut, leaves)
    L = (cut(normal(1, sum(PACK), 2, C)) / C).tril(-1).requires_grad_()
    A = torch.linalg.inv(torch.eye(C) + L)
    want = A @ (bs[..., None] * Gs.exp() * ks), A @ (bs[..., None] * vs)
    dw, du = rounded(backend, normal(*k.shape), normal(*v.shape))
    dk, dv, dbeta, dG, dL = torch.autograd.grad(want, (*leaves, L), (cut(dw), cut(du)))
    sew = lambda t: torch.cat([t.detach().transpose(1, 2)[n, :size] for n, size in enumerate([3, 32, 5, 1])])[None]
    tokens = [t.detach() for t in (k, v, beta, sew(A), q, G)]
    w, u, qg, kg = backend(recompute_w_u_fwd, *tokens, cu_seqlens=borders(PACK))
    close((w, u, qg), (sew(want[0]), sew(want[1]), (q * G.exp()).detach()), 64 * backend.eps)
    last = torch.cat([part[:, -1:].expand_as(part) for part in G.detach().split([3, 32, 5, 1], 1)], 1)
    assert distance(kg.cpu(), k.detach() * (last - G.detach()).exp()) < 64 * backend.eps
    got = backend(prepare_wy_repr_bwd, *tokens[:3], tokens[5], tokens[3], dw, du, cu_seqlens=borders(PACK))
    close(got, (dk, dv, dbeta, dG, sew(dL.tril(-1))), 64 * backend.eps)


# ---- 22_chunk_inter

def across_border(q, k, w, v_new, h, g, do, dh, dv, scale):
    "What the chunk hands on, each part times the gradient that arrives: outputs, state on exit, and what W takes out."
    G = g.cumsum(-2)
    o = torch.einsum("...ck,...kv->...cv", scale * q * G.exp(), h)
    exit = G[..., -1, :, None].exp() * h + torch.einsum("...ck,...cv->...kv", k * (G[..., -1:, :] - G).exp(), v_new)
    return (o * do).sum() + (exit * dh).sum() - (torch.einsum("...ck,...kv->...cv", w, h) * dv).sum()


@pytest.mark.parametrize("C, K, V, kind", [(*size, "mild") for size in SIZES] + [(32, 20, 17, kind) for kind in ("0", "-500")])
def test_across_the_border(backend, C, K, V, kind):
    g = DECAYS[kind]((2, 1, C, K)) / (C if kind == "mild" else 1)
    q, k, w, v_new, h, g, do, dh, dv = rounded(
        backend, *(normal(2, 1, C, K) for _ in range(3)), normal(2, 1, C, V), normal(2, 1, K, V), g,
        normal(2, 1, C, V), normal(2, 1, K, V), normal(2, 1, C, V))
    x = [t.requires_grad_() for t in (q, k, w, g)]
    want = torch.autograd.grad(across_border(q, k, w, v_new, h, g, do, dh, dv, 0.3), x)
    q, k, w, g = (t.detach() for t in x)
    since, until = g.cumsum(-2).exp(), F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2).exp()
    got = backend(inter_chunk_bwd, q, k, v_new, h, since, until, do, dh, dv, 0.3)
    close(got, want, 32 * backend.eps)


def test_across_the_border_of_no_chunks(backend):
    q, v, h = torch.zeros(0, 2, 32, 8), torch.zeros(0, 2, 32, 4), torch.zeros(0, 2, 8, 4)
    shapes = [x.shape for x in backend(inter_chunk_bwd, q, q, v, h, q, q, v, h, v, 1.0)]
    assert shapes == [q.shape] * 4


def test_operator_across_the_border(backend):
    q, k, v, g, _, G = token_inputs(backend)
    T, n = sum(PACK), 4
    w, do, dv, h, dh = rounded(backend, normal(1, T, 2, 12), normal(1, T, 2, 20), normal(1, T, 2, 20),
                               normal(1, n, 2, 12, 20), normal(1, n, 2, 12, 20))
    shared = [t.expand(1, -1, 2, -1).detach().requires_grad_() for t in (q, k)]
    x = [*shared, w.requires_grad_(), g.requires_grad_()]
    cut = lambda t: to_chunks(t, borders(PACK), C)
    loss = across_border(*map(cut, x[:3]), cut(v), h[0], cut(g), cut(do), dh[0], cut(dv), 0.3)
    want = torch.autograd.grad(loss, x)
    *got, dG = backend(chunk_kda_bwd_dqkwg, q, k, w.detach(), v, h, G, do, dh, dv, 0.3, borders(PACK), C)
    close(got, want[:3], 64 * backend.eps)
    dg = chunk_local_cumsum(dG.cpu(), C, True, cu_seqlens=borders(PACK), output_dtype=F64)
    assert distance(dg, want[3]) < 256 * backend.eps
