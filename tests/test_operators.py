"""What `chunk_kda` shares with its siblings: token by token, one decay a head, and the options they all take."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import borders, cast, distance, draw, gradients, recurrence, recurrence_packed
from kda_lit import (chunk_gated_delta_rule, chunk_kda, fused_kda_gate, fused_recurrent_gated_delta_rule, fused_recurrent_kda,
                     naive_recurrent_kda)

EPS = torch.finfo(torch.float32).eps
KDA = [chunk_kda, fused_recurrent_kda]
GDN = {chunk_gated_delta_rule: chunk_kda, fused_recurrent_gated_delta_rule: fused_recurrent_kda}


def ragged(lens, **options):
    return draw(1, sum(lens), H=2, HV=4, K=6, V=10, N=len(lens), **options), borders(lens)


def run(op, x, **options): return op(**x, output_final_state=True, **options)


def upstream(x): return torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])


# ---- token by token

@given(lens=st.lists(st.integers(0, 70), min_size=1, max_size=5))
@settings(max_examples=10)
def test_recurrent_ragged(lens):
    x, cu_seqlens = ragged(lens)
    want = recurrence_packed(x, cu_seqlens)
    for a, b in zip(run(fused_recurrent_kda, x, cu_seqlens=cu_seqlens), want): assert distance(a, b) < 1e-13


@pytest.mark.parametrize("decay", [0., -1., -20., -80., -500.])
@pytest.mark.parametrize("lens", [[0, 3, 0, 70, 1], [65]], ids=str)
def test_recurrent_gradients(lens, decay):
    x, cu_seqlens = ragged(lens, decay=decay)
    alone = lambda output_final_state, **x: recurrence_packed(x, cu_seqlens)
    do, dS = upstream(x)
    want = gradients(alone, x, do, dS)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 32 * EPS)):
        got = gradients(fused_recurrent_kda, cast(x, dtype), do.to(dtype), dS.to(dtype), cu_seqlens=cu_seqlens)
        for name in want: assert distance(got[name], want[name]) < tol, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recurrent_half_precision(dtype):
    x = draw(2, 33, HV=4, dtype=dtype)
    (o, S), (want, want_S) = run(fused_recurrent_kda, x), recurrence(x)
    assert o.dtype == dtype and S.dtype == torch.float32
    assert ((o.double() - want).abs() <= torch.finfo(dtype).eps / 2 * want.abs() + 1e-5 * want.abs().max()).all()
    assert distance(S, want_S) < 16 * EPS


# ---- options of both

@pytest.mark.parametrize("op", KDA)
@pytest.mark.parametrize("lower_bound", [None, -5.])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_raw_gates_and_raw_strengths(op, lower_bound, allow_neg_eigval):
    "The options give what the gate's own function gives, and gradients for its parameters."
    x = draw(2, 40, H=2, HV=4, K=6, V=10)
    x["g"], x["beta"] = torch.randn_like(x["g"]), torch.randn_like(x["beta"])
    x["A_log"], x["dt_bias"] = torch.randn(4).double(), torch.randn(24).double()

    def by_hand(A_log, dt_bias, g, beta, **x):
        g = fused_kda_gate(g.flatten(-2), A_log, 6, dt_bias, lower_bound=lower_bound)
        return naive_recurrent_kda(g=g, beta=beta.sigmoid() * (2 if allow_neg_eigval else 1), **x)

    options = dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=allow_neg_eigval,
                   lower_bound=lower_bound)
    for a, b in zip(run(op, x, **options), run(by_hand, x)): assert distance(a, b) < 1e-13
    do, dS = upstream(x)
    got, want = gradients(op, x, do, dS, **options), gradients(by_hand, x, do, dS)
    for name in want: assert distance(got[name], want[name]) < 1e-12, name


@pytest.mark.parametrize("op", KDA)
def test_norm_inside_gradients(op):
    "Norms inside the operator, their gradient too, as divisions outside it; long and short vectors."
    x = draw(2, 40)
    x["q"], x["k"] = 5 * x["q"], 0.2 * x["k"]
    unit = lambda t: t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    outside = lambda q, k, **rest: naive_recurrent_kda(unit(q), unit(k), **rest)
    do, dS = upstream(x)
    got, want = gradients(op, x, do, dS, use_qk_l2norm_in_kernel=True), gradients(outside, x, do, dS)
    for name in want: assert distance(got[name], want[name]) < 1e-12, name


@pytest.mark.parametrize("op", KDA)
def test_states_with_values_first(op):
    x = draw(2, 40, K=6, V=10)
    turned = dict(x, initial_state=x["initial_state"].mT)
    (o, S), (o_t, S_t) = run(op, x), run(op, turned, state_v_first=True)
    assert torch.equal(o, o_t) and torch.equal(S, S_t.mT)
    if op is chunk_kda:
        h, h_t = (run(op, y, state_v_first=y is turned, return_intermediate_states=True)[2] for y in (x, turned))
        assert torch.equal(h, h_t.mT)
    do, dS = upstream(x)
    got = gradients(op, turned, do, dS.mT, state_v_first=True)
    assert distance(got["initial_state"].mT, gradients(op, x, do, dS)["initial_state"]) < 1e-14


@pytest.mark.parametrize("cu_seqlens", [None, borders([0, 70, 65])], ids=["batch", "packed"])
def test_states_in_between(cu_seqlens):
    "h is the state on entry to each chunk: what the recurrence holds after that many tokens."
    x = draw(1, 135, N=1 if cu_seqlens is None else 3)
    o, S, h = run(chunk_kda, x, cu_seqlens=cu_seqlens, return_intermediate_states=True)
    begins = [(0, 0, 0), (0, 0, 64), (0, 0, 128)] if cu_seqlens is None else [(1, 0, 0), (1, 0, 64), (2, 70, 70), (2, 70, 134)]
    assert h.shape == (1, len(begins), 2, 16, 16)
    for i, (n, a, b) in enumerate(begins):
        before = {name: x[name][:, a:b] for name in ("q", "k", "v", "g", "beta")}
        want = recurrence({**before, "initial_state": x["initial_state"][n:n + 1]})[1]
        assert distance(h[:, i], want) < 1e-13


def test_keeping_more_for_the_backward_pass_changes_nothing():
    x, cu_seqlens = ragged([3, 0, 70])
    do, dS = upstream(x)
    a, b = (gradients(chunk_kda, x, do, dS, cu_seqlens=cu_seqlens, disable_recompute=keep) for keep in (False, True))
    for name in a: assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("op", KDA)
@pytest.mark.parametrize("wanted", [["q"], ["g"], ["initial_state"], ["v", "beta"]], ids=str)
def test_gradients_only_where_they_are_wanted(op, wanted):
    "And only the output, or only the final state, may reach the loss."
    x = draw(1, 70)
    for part in (0, 1):
        some = {name: t.clone().requires_grad_(name in wanted) for name, t in x.items()}
        every = {name: t.clone().requires_grad_() for name, t in x.items()}
        loss = [run(op, y)[part].square().sum() for y in (some, every)]
        want = torch.autograd.grad(loss[1], [every[name] for name in wanted], allow_unused=True)
        got = torch.autograd.grad(loss[0], [some[name] for name in wanted], allow_unused=True)
        for a, b in zip(got, want): assert distance(a, b) < 1e-14


# ---- one decay a head

@pytest.mark.parametrize("op", GDN)
def test_gated_delta_rule_is_kda_with_one_decay_a_head(op):
    x, cu_seqlens = ragged([3, 0, 70])
    x["g"] = x["g"][..., 0].clone()
    wide = lambda g, **rest: GDN[op](g=g[..., None].expand(*g.shape, 6), **rest)
    do, dS = upstream(x)
    for a, b in zip(run(op, x, cu_seqlens=cu_seqlens), run(wide, x, cu_seqlens=cu_seqlens)): assert torch.equal(a, b)
    got, want = gradients(op, x, do, dS, cu_seqlens=cu_seqlens), gradients(wide, x, do, dS, cu_seqlens=cu_seqlens)
    for name in want: assert distance(got[name], want[name]) < 1e-13, name
