"""States that walk, from chunk to chunk and from token to token, and what is read from them: in PyTorch and in Triton."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from helpers import NAMES, borders, distance, draw, gradients, recurrence_packed
from kda_lit import (chunk_bwd_dv_local, chunk_gated_delta_rule, chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h,
                     chunk_gla_bwd_dA, chunk_gla_fwd_o_gk, chunk_kda, fused_recurrent_gated_delta_rule, fused_recurrent_kda, use_backend)
from kda_lit.chunk_delta_h import chunk_scan, chunk_scan_bwd, new_values
from kda_lit.chunk_o import read_out, scalar_decay_scores, scores_bwd, writes_bwd
from kda_lit.fused_recurrent import recurrent_bwd, recurrent_fwd

F64 = torch.float64
SIZES = [(64, 128, 60), (32, 60, 100), (16, 256, 17), (64, 8, 256), (16, 1, 1)]        # C, K, V
LENS = [[2, 0, 1], [3], [0, 0]]                                                        # chunks of each sequence


def normal(*shape): return torch.randn(shape, dtype=F64)


def close(got, want, tol):
    for a, b in zip(got, want, strict=True): assert distance(a.cpu(), b) < tol


# ---- 20_chunk_delta_h

def walk_inputs(backend, lens, C, K, V, H=2):
    "Keys short enough that states neither grow nor die; one channel in five forgets everything."
    NT, N = sum(lens), len(lens)
    qg, kg, w = (normal(NT, H, C, K) / (C * K) ** 0.5 for _ in range(3))
    decay = torch.rand(NT, H, K, dtype=F64)
    decay[..., ::5] = 0
    x = qg, kg, w, decay, normal(NT, H, C, V), normal(NT, H, C, V), normal(N, H, K, V), normal(N, H, K, V)
    return *map(backend.rounded, x), borders(lens)


def walk(w, u, kg, decay, S, offsets):
    "Equations 1 and 2 chunk by chunk, one sequence after the other."
    h, v_new, final = [], [], []
    for n, (a, b) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        state = S[n]
        for i in range(a, b):
            h.append(state)
            v_new.append(u[i] - torch.einsum("hck,hkv->hcv", w[i], state))
            state = decay[i, :, :, None] * state + torch.einsum("hck,hcv->hkv", kg[i], v_new[-1])
        final.append(state)
    empty = lambda parts, like: torch.stack(parts) if parts else like
    return empty(h, S.new_zeros(0, *S.shape[1:])), empty(v_new, u), torch.stack(final)


@pytest.mark.parametrize("lens, size", [(LENS[0], size) for size in SIZES] + [(lens, (16, 20, 30)) for lens in LENS], ids=str)
def test_walk(backend, lens, size):
    _, kg, w, decay, u, _, S, _, offsets = walk_inputs(backend, lens, *size)
    h, v_new, final = walk(w, u, kg, decay, S, offsets)
    close(backend(chunk_scan, w, u, kg, decay, S, offsets), (h, v_new, final), 32 * backend.eps)
    assert distance(backend(new_values, w, u, backend.rounded(h)).cpu(), v_new) < 32 * backend.eps


@pytest.mark.parametrize("lens, size", [(LENS[0], size) for size in SIZES] + [(lens, (16, 20, 30)) for lens in LENS], ids=str)
def test_walk_back(backend, lens, size):
    "Against autograd: a loss of all states on exit, of all outputs that are read, of all writes."
    qg, kg, w, decay, do, dv, S, dS, offsets = walk_inputs(backend, lens, *size)
    u = normal(*do.shape).requires_grad_()
    h, v_new, final = walk(w, u, kg, decay, S.requires_grad_(), offsets)
    want = torch.autograd.grad(((qg @ h) * do).sum() + (v_new * dv).sum() + (final * dS).sum(), (u, S), materialize_grads=True)
    dh, *got = backend(chunk_scan_bwd, qg, kg, w, decay, do, dv, dS, offsets)
    close(got, want, 32 * backend.eps)
    for n, length in enumerate(lens):                      # what leaves the last chunk is handed in
        if length: assert torch.equal(dh[offsets[n + 1] - 1].cpu().double(), dS[n])
    assert dh.shape == h.shape and dh.isfinite().all()


PACK = [3, 0, 70, 1]


def test_operators_of_the_walk(backend):
    "Public shapes, a ragged pack; one decay a head, and one a channel."
    T, cu_seqlens = sum(PACK), borders(PACK)
    q, k, w = (backend.rounded(normal(1, T, 2, 12) / 8) for _ in range(3))
    u, do, dv = (backend.rounded(normal(1, T, 2, 20)) for _ in range(3))
    g, S = backend.rounded(-torch.rand(1, T, 2).double() / 9), backend.rounded(normal(4, 2, 12, 20))
    for options in (dict(g=g), dict(gk=g[..., None].expand_as(k))):
        forth = dict(initial_state=S, output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=32, **options)
        close(backend(chunk_gated_delta_rule_fwd_h, k, w, u, **forth), chunk_gated_delta_rule_fwd_h(k, w, u, **forth), 64 * backend.eps)
        back = dict(h0=S, dht=S, cu_seqlens=cu_seqlens, chunk_size=32, **options)
        close(backend(chunk_gated_delta_rule_bwd_dhu, q, k, w, do, dv, **back),
              chunk_gated_delta_rule_bwd_dhu(q, k, w, do, dv, **back), 64 * backend.eps)


# ---- 21_chunk_o

CHUNKS = [(2, 2), (3,), (0, 2), ()]


@pytest.mark.parametrize("chunks, size", [((2, 1), size) for size in SIZES] + [(c, (16, 20, 30)) for c in CHUNKS], ids=str)
def test_read_out(backend, chunks, size):
    "And its two gradients inside the chunk; also for no chunk, and for one alone."
    C, K, V = size
    qg, A, v_new, S, do = map(backend.rounded, (normal(*chunks, C, K), normal(*chunks, C, C).tril(), normal(*chunks, C, V),
                                                normal(*chunks, K, V), normal(*chunks, C, V)))
    want = torch.einsum("...ck,...kv->...cv", qg, S) + torch.einsum("...cd,...dv->...cv", A, v_new)
    later = torch.arange(C) > torch.arange(C)[:, None]
    dA = torch.einsum("...cv,...dv->...cd", do, v_new).masked_fill(later, 0)
    got = backend(read_out, qg, A, v_new, S), backend(scores_bwd, do, v_new), backend(writes_bwd, A, do)
    close(got, (want, dA, torch.einsum("...cd,...cv->...dv", A, do)), 16 * backend.eps)


@pytest.mark.parametrize("decay", [-0.5, 0., -500.])
@pytest.mark.parametrize("shape", [(2, 1, 64, 128), (1, 32, 60), (16, 100), (0, 16, 8)], ids=str)
def test_scores_with_one_decay_a_head(backend, shape, decay):
    "A weight of 500 at every fifth token resets; between resets scores keep their precision."
    q, k = backend.rounded(normal(*shape)), backend.rounded(normal(*shape))
    g = -torch.rand(shape[:-1], dtype=F64)
    g[..., ::5] = decay
    g = backend.rounded(g)
    i = torch.arange(shape[-2])
    passed = (i[None, None] > i[None, :, None]) & (i[None, None] <= i[:, None, None])  # m in (j, i], [i, j, m]
    between = torch.einsum("...m,ijm->...ij", g, passed.double()).exp()
    want = (torch.einsum("...ik,...jk->...ij", q, k) * between).tril()
    assert distance(backend(scalar_decay_scores, q, k, g).cpu(), want) < 16 * backend.eps


def test_operators_of_reading(backend):
    T, cu_seqlens = sum(PACK), borders(PACK)
    q, k, do, v = (backend.rounded(normal(1, T, 2, n)) for n in (12, 12, 20, 20))
    G, A, h = backend.rounded(-torch.rand(1, T, 2, 12).double()), backend.rounded(normal(1, T, 2, 32)), backend.rounded(normal(1, 5, 2, 12, 20))
    packed = dict(cu_seqlens=cu_seqlens, chunk_size=32)
    gamma = backend.rounded(torch.tensor([-0.1, -0.5], dtype=F64))
    for f, x, options in [(chunk_gla_fwd_o_gk, (q, v, G, A, h, 0.3), {}), (chunk_gla_bwd_dA, (v, do, 0.3), {}),
                          (chunk_bwd_dv_local, (q, k, do), dict(A=A)), (chunk_bwd_dv_local, (q, k, do), dict(g_gamma=gamma))]:
        assert distance(backend(f, *x, **packed, **options).cpu(), f(*x, **packed, **options)) < 32 * backend.eps


# ---- 31_fused_recurrent

TOKENS = [[3, 0, 10, 1], [8, 1], [0], []]


def tokens(backend, lens, K, V, H):
    x = draw(1, sum(lens), H=H, K=K, V=V, N=len(lens))
    x["g"][:, ::5] = -500
    return {name: backend.rounded(t) for name, t in x.items()}


@pytest.mark.parametrize("lens, size", [(TOKENS[0], (*s, 1)) for s in [(128, 60), (60, 100), (256, 17), (1, 1)]]
                         + [(lens, (12, 20, 2)) for lens in TOKENS], ids=str)
def test_tokens(backend, lens, size):
    "Forward and backward, states kept every 8 tokens; scale 1, as the equation has it."
    x, offsets = tokens(backend, lens, *size), borders(lens).int()
    flat = [x[name].flatten(0, 1) for name in NAMES]
    o, S, kept = backend(recurrent_fwd, *flat, x["initial_state"], offsets, 8)
    do, dS = backend.rounded(normal(*x["v"].shape)), backend.rounded(normal(*S.shape))
    *grads, dS0 = backend(recurrent_bwd, *flat, kept, do[0], dS, offsets, 8)
    if not sum(lens): return close((S, dS0), (x["initial_state"], dS), 1e-30)
    alone = lambda output_final_state, **x: recurrence_packed(x, offsets, scale=1.0)
    close((o[None], S), alone(True, **x), 16 * backend.eps)
    close((*(d[None] for d in grads), dS0), gradients(alone, x, do, dS).values(), 32 * backend.eps)
    assert torch.equal(backend(recurrent_fwd, *flat, x["initial_state"], offsets, 0)[1], S)


@pytest.mark.parametrize("op", [fused_recurrent_kda, fused_recurrent_gated_delta_rule, chunk_kda, chunk_gated_delta_rule])
def test_operators(backend, op):
    "Grouped heads, unit length inside, a ragged pack with an empty sequence, states in and out, all gradients."
    lens = [2, 0, 9]
    x, cu_seqlens = draw(1, sum(lens), H=2, HV=4, K=6, V=20, N=len(lens)), borders(lens)
    x["q"], x["k"] = 3 * x["q"], 0.5 * x["k"]
    if op in (fused_recurrent_gated_delta_rule, chunk_gated_delta_rule): x["g"] = x["g"][..., 0].clone()
    x = {name: backend.rounded(t) for name, t in x.items()}
    do, dS = backend.rounded(normal(*x["v"].shape)), backend.rounded(normal(*x["initial_state"].shape))
    unit = lambda t: t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def alone(q, k, g, output_final_state, **rest):
        g = g if g.ndim == 4 else g[..., None].expand(*g.shape, q.shape[-1])
        return recurrence_packed(dict(q=unit(q), k=unit(k), g=g, **rest), cu_seqlens)

    options = dict(cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True)
    close(backend(op, **x, output_final_state=True, **options), alone(**x, output_final_state=True), 16 * backend.eps)
    got, want = backend(gradients, op, x, do, dS, **options), gradients(alone, x, do, dS)
    close(got.values(), want.values(), 32 * backend.eps)


class NoEquations(TorchDispatchMode):
    "Only glue may stay in PyTorch: it may move numbers and scale them, but neither multiply matrices nor sum along tokens."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        assert not any(word in name for word in ("mm", "matmul", "einsum", "cumsum", "bilinear")) or not args[0].is_floating_point(), name
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [fused_recurrent_kda, chunk_kda])
def test_nothing_falls_back(op):
    "From raw gates to all gradients, every equation is a kernel's."
    x = {name: t.to(DEVICE, torch.float32) for name, t in draw(1, 5, K=6, V=10).items()}
    options = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=torch.zeros(2, device=DEVICE),
                   use_beta_sigmoid_in_kernel=True)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    with use_backend("triton"), NoEquations(): gradients(op, x, do, dS, **options)
    with use_backend("torch"), pytest.raises(AssertionError), NoEquations(): gradients(op, x, do, dS, **options)


def test_one_token_at_a_time(backend):
    "What decoding does; a state handed on is a state."
    x = {name: backend.rounded(t) for name, t in draw(3, 4, K=12, V=20).items()}
    whole, S = backend(fused_recurrent_kda, **x, output_final_state=True)
    state, outputs = x.pop("initial_state"), []
    for t in range(4):
        o, state = backend(fused_recurrent_kda, *(x[name][:, t:t + 1] for name in NAMES), None, state, True)
        outputs.append(o)
    close((torch.cat(outputs, 1), state), (whole.cpu(), S.cpu()), 8 * backend.eps)


# ---- offsets

ROOM = DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory > 40e9


def last_chunks(name, n):
    "The result of n sequences of 64 tokens at its end, and what its last three sequences give alone."
    random = lambda *shape: torch.randn(n, 1, *shape, device=DEVICE) / 8
    x, S, begin = random(64, 128), random(16, 128), torch.arange(n + 1, device=DEVICE)
    a, b, decay = random(64, 16), random(64, 16), random(16).abs()
    if name == "read_out": f = lambda s: read_out(a[s], A[s], x[s], S[s])
    if name == "chunk_scan": f = lambda s: chunk_scan(a[s], x[s], b[s], decay[s], S[s], begin[:len(S[s]) + 1])[1]
    if name == "recurrent_fwd":
        one = lambda t, s: t[s].reshape(-1, *t.shape[1:2], *t.shape[3:])                      # token by token
        f = lambda s: recurrent_fwd(one(a, s), one(b, s), one(x, s), -one(a, s).abs(), one(a, s)[..., 0], S[s],
                                    begin[:len(S[s]) + 1] * 64, 0)[0]
    A = random(64, 64) if name == "read_out" else None
    return f(slice(None))[-3:], f(slice(-3, None))[-3:]


@pytest.mark.skipif(not ROOM, reason="needs a GPU with 40 GB")
@pytest.mark.parametrize("name", ["read_out", "chunk_scan", "recurrent_fwd"])
def test_more_numbers_than_int32_can_count(name): assert torch.equal(*last_chunks(name, 2**31 // (64 * 128) + 2))
