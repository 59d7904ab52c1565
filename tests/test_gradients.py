"""Each piece of the algorithm, and each operator made of them: is its gradient, derived by hand, that of its forward pass?

A piece is judged by numbers alone (gradcheck) and by autograd through its own forward pass; an operator by autograd through
the recurrence. Then everything must be indifferent to what packs it, in which order, and what the future brings.
"""
from typing import Callable, NamedTuple

import pytest
import torch

import kda_lit as kl
from helpers import NAMES, borders, cast, distance, draw, recurrence, recurrence_packed

C = 16                                                       # short chunks: a few tokens already make two of them
EPS = torch.finfo(torch.float32).eps
DECAYS = [0., -1., -20., -80., -500.]
PACK = [19, 0, 16, 1, 34]
OF_SEQUENCES, OF_CHUNKS, OF_HEADS = {"S0", "S", "initial_state"}, {"h", "S_next"}, {"A_log", "bias"}  # the rest: of tokens


class Piece(NamedTuple):
    inputs: str  # names of what it is differentiated in
    outputs: str
    forward: Callable  # (all inputs by name, cu_seqlens) → outputs
    backward: Callable  # (all inputs by name, gradients of the outputs, cu_seqlens) → gradients of `inputs`
    reference: Callable | None = None  # another forward pass; None: its own, left to autograd

    def leaves(self, x): return tuple(x[name] for name in self.inputs.split())

    def put(self, x, leaves): return x | dict(zip(self.inputs.split(), leaves))


def by_hand(piece, x, cu=None):
    "A piece as one differentiable function of its inputs."
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            ctx.save_for_backward(*leaves)
            return tuple(piece.forward(piece.put(x, leaves), cu))

        @staticmethod
        def backward(ctx, *d):
            with torch.no_grad(): return tuple(piece.backward(piece.put(x, ctx.saved_tensors), d, cu))
    return Function.apply


def by_autograd(piece, x, d, cu=None, forward=None):
    leaves = [t.detach().clone().requires_grad_() for t in piece.leaves(x)]
    with torch.enable_grad(): outputs = (forward or piece.reference or piece.forward)(piece.put(x, leaves), cu)
    return torch.autograd.grad(outputs, leaves, list(d))


# ---- the pieces, each with the operators that the reference library has for it

def l2norm(x, cu): return kl.l2norm_fwd(x["q"])[:1]
def l2norm_bwd(x, d, cu): return [kl.l2norm_bwd(*kl.l2norm_fwd(x["q"]), *d)]


def flat_gate(x): return x["g"].flatten(-2), x["A_log"], x["g"].shape[-1], x["bias"].flatten(), x["beta"]


def gate(bound):
    def forward(x, cu): return kl.kda_gate_fwd(*flat_gate(x), lower_bound=bound)

    def backward(x, d, cu):
        grads = kl.kda_gate_bwd(d[0], *flat_gate(x), d[1], lower_bound=bound)
        return [dx.view_as(t) for dx, t in zip(grads, (x["g"], x["A_log"], x["bias"], x["beta"]))]
    return Piece("g A_log bias beta", "y strength", forward, backward)


def local_sum(x, cu): return [kl.chunk_local_cumsum(x["g"], C, cu_seqlens=cu, output_dtype=x["g"].dtype)]
def local_sum_bwd(x, d, cu): return [kl.chunk_local_cumsum(*d, C, True, cu_seqlens=cu, output_dtype=d[0].dtype)]
def global_sum(x, cu): return [kl.chunk_global_cumsum(x["g"], cu_seqlens=cu, output_dtype=x["g"].dtype)]
def global_sum_bwd(x, d, cu): return [kl.chunk_global_cumsum(*d, True, cu_seqlens=cu, output_dtype=d[0].dtype)]


def wy(x, cu):
    A = kl.solve_tril(x["L"], cu, x["L"].dtype)
    return kl.recompute_w_u_fwd(x["k"], x["v"], x["beta"], A, None, x["G"], cu)[:2]


def wy_bwd(x, d, cu):
    A = kl.solve_tril(x["L"], cu, x["L"].dtype)
    dk, *others = kl.prepare_wy_repr_bwd(x["k"], x["v"], x["beta"], x["G"], A, *d, cu)
    return shared(dk, x["k"]), *others


def scores(x, cu):
    Aqk, Akk = kl.chunk_kda_fwd_intra(x["q"], x["k"], x["G"], x["beta"], 1., cu, C, x["q"].dtype)
    return Aqk, *kl.recompute_w_u_fwd(x["k"], x["v"], x["beta"], Akk, None, x["G"], cu)[:2]


def scores_bwd(x, d, cu):
    "As in the reference library: the solve's gradient is in prepare_wy_repr_bwd, the sum in chunk_kda_bwd_intra."
    q, k, v, G, beta = (x[name] for name in ("q", "k", "v", "G", "beta"))
    _, Akk = kl.chunk_kda_fwd_intra(q, k, G, beta, 1., cu, C, q.dtype)
    dk, dv, db, dG, dL = kl.prepare_wy_repr_bwd(k, v, beta, G, Akk, *d[1:], cu)
    dq, dk, db, dG = kl.chunk_kda_bwd_intra(q, k, G, beta, d[0], dL, 0 * dk, dk, db, dG, cu, C)
    return shared(dq, q), shared(dk, k), dv, dG, db


def states(by_head):
    "u and initial states to what queries read, to what tokens write and to final states; one decay a head, or a channel."
    def prepared(x, cu):
        G = x["G"][..., :1].expand_as(x["G"]) if by_head else x["G"]
        _, _, qg, kg = kl.recompute_w_u_fwd(x["k"], x["v"], x["beta"], x["L"], x["q"], G, cu)
        if not by_head: return qg, kg, dict(gk=G)
        many = lambda t: t.repeat_interleave(G.shape[2] // t.shape[2], 2)
        return many(x["q"]), many(x["k"]), dict(g=G[..., 0])

    def forward(x, cu):
        qg, keys, decay = prepared(x, cu)
        if by_head: qg = qg * decay["g"][..., None].exp()
        at = dict(output_final_state=True, chunk_size=C, cu_seqlens=cu)
        h, v_new, S = kl.chunk_gated_delta_rule_fwd_h(keys, x["w"], x["u"], initial_state=x["S0"], **decay, **at)
        return kl.chunk_gla_fwd_o_gk(qg, 0 * x["v"], 0 * x["G"], 0 * x["L"], h, 0.5, cu, C), v_new, S

    def backward(x, d, cu):
        qg, keys, decay = prepared(x, cu)
        _, dS0, du = kl.chunk_gated_delta_rule_bwd_dhu(qg, keys, x["w"], d[0], d[1], **decay, h0=x["S0"], dht=d[2],
                                                       scale=0.5, cu_seqlens=cu, chunk_size=C)
        return du, dS0
    return Piece("u S0", "o v_new S", forward, backward)


def read(x, cu): return [kl.chunk_gla_fwd_o_gk(x["q"], x["v"], x["G"], x["A"], x["h"], 0.5, cu, C)]


def read_bwd(x, d, cu):
    dA = kl.chunk_gla_bwd_dA(x["v"], *d, 1., cu, C).to(x["A"].dtype)
    keys = torch.zeros_like(x["G"])                          # not read where A is given
    return kl.chunk_bwd_dv_local(keys, keys, *d, A=x["A"], cu_seqlens=cu, chunk_size=C), dA


def read_local(x, cu):
    "The in-chunk part alone, with one decay a head."
    G, many = x["G"][..., :1].expand_as(x["G"]), dict(output_dtype=x["q"].dtype)
    A, _ = kl.chunk_kda_fwd_intra(x["q"], x["k"], G, x["beta"], 0.5, cu, C, **many)
    return [kl.chunk_gla_fwd_o_gk(x["q"], x["v"], G, A, 0 * x["h"], 0.5, cu, C)]


def read_local_bwd(x, d, cu):
    q, k = (x[name].repeat_interleave(x["G"].shape[2] // x[name].shape[2], 2) for name in "qk")
    return [kl.chunk_bwd_dv_local(q, k, *d, g=x["G"][..., 0], scale=0.5, cu_seqlens=cu, chunk_size=C)]


def apart(x, cu):
    "Each chunk as a sequence of its own, all in one row; so the states on entry are the initial states."
    B, T = x["v"].shape[:2]
    ends = (borders([T] * B) if cu is None else cu).tolist()
    lens = [min(C, b - t) for a, b in zip(ends, ends[1:]) for t in range(a, b, C)]
    return {name: x[name].flatten(0, 1)[None] for name in "q k v G beta L w u h".split()}, borders(lens)


def across(x, cu):
    y, every = apart(x, cu)
    _, _, qg, kg = kl.recompute_w_u_fwd(y["k"], y["v"], y["beta"], y["L"], y["q"], y["G"], every)
    _, _, S = kl.chunk_gated_delta_rule_fwd_h(kg, y["w"], y["u"], gk=y["G"], initial_state=y["h"][0],
                                              output_final_state=True, chunk_size=C, cu_seqlens=every)
    o = kl.chunk_gla_fwd_o_gk(y["q"], 0 * y["v"], y["G"], 0 * y["L"], y["h"], 0.5, every, C)
    return o.view(x["v"].shape), S.view(x["h"].shape)


def across_bwd(x, d, cu):
    (y, every), (do, dS) = apart(x, cu), d
    _, _, qg, kg = kl.recompute_w_u_fwd(y["k"], y["v"], y["beta"], y["L"], y["q"], y["G"], every)
    _, v_new, _ = kl.chunk_gated_delta_rule_fwd_h(kg, y["w"], y["u"], gk=y["G"], initial_state=y["h"][0],
                                                  chunk_size=C, cu_seqlens=every)
    none = torch.zeros_like(v_new)
    dv = kl.chunk_gated_delta_rule_bwd_dhu(qg, kg, y["w"], none, none, gk=y["G"], dht=dS.flatten(0, 1),
                                           cu_seqlens=every, chunk_size=C)[2]
    v_new, dv = (t.view(x["v"].shape) for t in (v_new, dv))
    dq, dk, dw, dG = kl.chunk_kda_bwd_dqkwg(x["q"], x["k"], x["w"], v_new, x["h"], x["G"], do, dS, dv, 0.5, cu, C)
    return shared(dq, x["q"]), shared(dk, x["k"]), dw, dG


def shared(d, x):
    "The gradient of heads that several value heads read."
    return d.unflatten(2, (x.shape[2], -1)).sum(3)


PIECES = {
    "l2norm": Piece("q", "y", l2norm, l2norm_bwd),
    "gate": gate(None), "bounded gate": gate(-5.),
    "local sum": Piece("g", "G", local_sum, local_sum_bwd), "global sum": Piece("g", "G", global_sum, global_sum_bwd),
    "wy": Piece("k v beta G L", "w u", wy, wy_bwd), "scores and wy": Piece("q k v G beta", "Aqk w u", scores, scores_bwd),
    "states": states(False), "states, one decay a head": states(True),
    "read": Piece("v A", "o", read, read_bwd), "read, one decay a head": Piece("v", "o", read_local, read_local_bwd),
    "across": Piece("q k w G", "o S_next", across, across_bwd)}


# ---- the operators, whole

def whole(op, scalar=False):
    def arguments(x): return {name: x[name] for name in NAMES} | dict(initial_state=x["S0"])

    def forward(x, cu):
        x = arguments(x)
        return op(**x | (dict(g=x["g"][..., 0]) if scalar else {}), cu_seqlens=cu, output_final_state=True)

    def reference(x, cu):
        x = arguments(x)
        if scalar: x["g"] = x["g"][..., :1].expand_as(x["g"])
        return recurrence(x) if cu is None else recurrence_packed(x, cu)
    piece = Piece("q k v g beta S0", "o S", forward, None, reference)
    return piece._replace(backward=lambda x, d, cu: by_autograd(piece, x, d, cu, forward))


OPERATORS = {
    "chunk_kda": whole(kl.chunk_kda), "fused_recurrent_kda": whole(kl.fused_recurrent_kda),
    "chunk_gated_delta_rule": whole(kl.chunk_gated_delta_rule, True),
    "fused_recurrent_gated_delta_rule": whole(kl.fused_recurrent_gated_delta_rule, True)}
EVERYTHING = PIECES | OPERATORS
FADING = {name: piece for name, piece in EVERYTHING.items() if name not in ("l2norm", "gate", "bounded gate")}
pieces = pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
everything = pytest.mark.parametrize("piece", EVERYTHING.values(), ids=EVERYTHING)


# ---- inputs and upstream gradients

def setting(B=2, T=37, lens=None, H=2, HV=4, K=5, V=7, decay=None, seed=0):
    "All that any piece reads, in float64, and cu_seqlens."
    if lens is not None: B, T = 1, sum(lens)
    cu, N = (None, B) if lens is None else (borders(lens), len(lens))
    x = draw(B, T, H, K, V, HV, N=N, decay=decay, seed=seed)
    if decay is None: x["g"] = x["g"] - 0.1              # away from 0, where a cumulative sum stops to be possible
    x["S0"], noise = x.pop("initial_state"), torch.Generator().manual_seed(seed + 1)
    normal = lambda *shape: torch.randn(shape, generator=noise, dtype=torch.float64)
    x["G"] = kl.chunk_local_cumsum(x["g"], C, cu_seqlens=cu, output_dtype=torch.float64)
    NT = sum(-(-n // C) for n in ([T] if lens is None else lens))
    row = torch.arange(T) - (0 if lens is None else cu[:-1].repeat_interleave(cu.diff()))
    lower = torch.arange(C) < (row % C)[:, None, None]
    x |= dict(L=0.3 * normal(B, T, HV, C) * lower, A=normal(B, T, HV, C), w=0.3 * normal(B, T, HV, K), u=normal(B, T, HV, V),
              h=normal(B, NT, HV, K, V), A_log=normal(HV), bias=normal(HV, K))
    return x, cu


def upstream(piece, x, cu):
    noise = torch.Generator().manual_seed(7)
    return [torch.randn(y.shape, generator=noise, dtype=torch.float64).to(y.dtype) for y in piece.forward(x, cu)]


def gradient(piece, x, d, cu=None): return dict(zip(piece.inputs.split(), piece.backward(x, d, cu)))


# ---- numbers alone

@pytest.mark.parametrize("T, lens, HV", [(17, None, 1), (5, [2, 0, 3], 2)], ids=["two chunks", "packed"])
@pieces
def test_gradcheck(piece, T, lens, HV):
    x, cu = setting(1, T, lens, H=1, HV=HV, K=2, V=2)
    leaves = [t.requires_grad_() for t in piece.leaves(x)]
    assert torch.autograd.gradcheck(by_hand(piece, x, cu), leaves)


@pytest.mark.filterwarnings("ignore:Input #")            # gradcheck would rather have float64
@everything
def test_gradcheck_in_float32(piece):
    x, cu = setting(lens=[2, 0, 3], H=1, HV=2, K=2, V=2)
    x = cast(x, torch.float32)
    leaves = [t.requires_grad_() for t in piece.leaves(x)]
    f = lambda *leaves: tuple(piece.forward(piece.put(x, leaves), cu))
    assert torch.autograd.gradcheck(f if piece.reference else by_hand(piece, x, cu), leaves, eps=1e-3, atol=1e-2)


# ---- autograd

@pytest.mark.parametrize("lens", [None, PACK], ids=["batch", "packed"])
@everything
def test_autograd(piece, lens):
    x, cu = setting(lens=lens)
    d = upstream(piece, x, cu)
    got, want = gradient(piece, x, d, cu), by_autograd(piece, x, d, cu)
    for (name, a), b in zip(got.items(), want): assert distance(a, b) < 1e-12, name


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("piece", FADING.values(), ids=FADING)
def test_constant_decays(piece, decay):
    "Values and gradients in float32, against float64."
    x, cu = setting(lens=PACK, decay=decay)
    d, x32 = upstream(piece, x, cu), cast(x, torch.float32)
    values = (piece.reference or piece.forward)(x, cu)
    for a, b in zip(piece.forward(x32, cu), values): assert distance(a, b) < 16 * EPS
    got = gradient(piece, x32, [t.float() for t in d], cu)
    for (name, a), b in zip(got.items(), by_autograd(piece, x, d, cu)): assert distance(a, b) < 32 * EPS, name


# ---- what must not matter

def part(name, t, n, cu):
    "What belongs to sequence n of a pack."
    if name in OF_HEADS: return t
    if name in OF_SEQUENCES: return t[n:n + 1]
    ends = kl.prepare_chunk_offsets(cu, C) if name in OF_CHUNKS else cu
    return t[:, ends[n]:ends[n + 1]]


@everything
def test_packed_is_one_by_one(piece):
    x, cu = setting(lens=PACK)
    d, outputs = upstream(piece, x, cu), piece.outputs.split()
    values, grads = dict(zip(outputs, piece.forward(x, cu))), gradient(piece, x, d, cu)
    alone = []
    for n in range(len(PACK)):
        mine = {name: part(name, t, n, cu) for name, t in x.items()}
        mine_d = [part(name, t, n, cu) for name, t in zip(outputs, d)]
        for name, y in zip(outputs, piece.forward(mine, None)): assert distance(y, part(name, values[name], n, cu)) < 1e-13
        alone.append(gradient(piece, mine, mine_d))
    for name, whole in grads.items():
        if name in OF_HEADS: assert distance(sum(a[name] for a in alone), whole) < 1e-13, name; continue
        for n, a in enumerate(alone): assert distance(a[name], part(name, whole, n, cu)) < 1e-12, name


def permuted(name, t):
    rows, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    if name in OF_HEADS: return t[heads]
    return t[rows].index_select(1 if name in OF_SEQUENCES else 2, heads)


@everything
def test_order_of_batch_and_heads_is_free(piece):
    x, _ = setting(3, 19, H=3, HV=3)
    d, outputs = upstream(piece, x, None), piece.outputs.split()
    y = {name: permuted(name, t) for name, t in x.items()}
    for name, a, b in zip(outputs, piece.forward(y, None), piece.forward(x, None)):
        assert distance(a, permuted(name, b)) < 1e-14, name
    turned = gradient(piece, y, [permuted(name, t) for name, t in zip(outputs, d)])
    for name, t in gradient(piece, x, d).items(): assert distance(turned[name], permuted(name, t)) < 1e-14, name


@pytest.mark.parametrize("at", [1, 7, 16, 30])
@everything
def test_the_future_is_never_heard(piece, at):
    "Bit for bit: past outputs are the same whatever comes, and no gradient reaches a token from before it."
    x, _ = setting()
    of_tokens = lambda name: name not in OF_SEQUENCES | OF_CHUNKS | OF_HEADS
    after = {name: torch.cat([t[:, :at], 3 * t[:, at:] - 1], 1) if of_tokens(name) else t for name, t in x.items()}
    after["g"][:, at:] = after["G"][:, at:] = -500.
    outputs, d = piece.outputs.split(), upstream(piece, x, None)
    for name, a, b in zip(outputs, piece.forward(x, None), piece.forward(after, None)):
        if of_tokens(name): assert torch.equal(a[:, :at], b[:, :at]) and not torch.equal(a, b), name
    for name, t in zip(outputs, d): t[:, at if of_tokens(name) else 0:] = 0
    grads = gradient(piece, x, d)
    assert any(t.any() for t in grads.values())
    for name, t in grads.items():
        if of_tokens(name): assert not t[:, at:].any(), name
