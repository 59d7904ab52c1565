"""The hand-derived gradients and the operators' options: against numbers alone, against autograd, against each other."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kda_lit as kl
from helpers import NAMES, borders, distance, draw, gradients

F64 = torch.float64
OPERATORS = [kl.chunk_kda, kl.fused_recurrent_kda]
SCALAR = [kl.chunk_gated_delta_rule, kl.fused_recurrent_gated_delta_rule]


def leaves(x): return {name: t.clone().requires_grad_() for name, t in x.items()}


def flat(op, names, **options):
    "The operator as a function of its tensors alone, states included."
    def f(*tensors): return op(**dict(zip(names, tensors)), output_final_state=True, **options)
    return f


# ---- against numbers alone: autograd's own check at its default tolerances

@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("options", [
    {}, dict(use_qk_l2norm_in_kernel=True), dict(cu_seqlens=borders([0, 3, 1, 5]), scale=0.7), dict(state_v_first=True),
], ids=["plain", "unit keys", "packed", "V first"])
def test_gradcheck(op, options):
    N = 4 if "cu_seqlens" in options else 1
    x = draw(1, 9, H=1, K=3, V=3, HV=2, N=N)
    assert torch.autograd.gradcheck(flat(op, x, **options), tuple(leaves(x).values()))


@pytest.mark.parametrize("op", SCALAR)
def test_gradcheck_scalar_gate(op):
    x = draw(1, 9, H=1, K=3, V=2, HV=2)
    x["g"] = x["g"][..., 0].contiguous()
    assert torch.autograd.gradcheck(flat(op, x), tuple(leaves(x).values()))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradcheck_raw_gates(op, lower_bound):
    x = draw(1, 7, H=1, K=3, V=2, HV=2)
    x |= dict(A_log=torch.rand(2, dtype=F64), dt_bias=torch.randn(6, dtype=F64))
    f = flat(op, x, use_gate_in_kernel=True, lower_bound=lower_bound, use_beta_sigmoid_in_kernel=True,
             allow_neg_eigval=True)
    assert torch.autograd.gradcheck(f, tuple(leaves(x).values()))


@pytest.mark.filterwarnings("ignore:Input #")            # gradcheck would rather have float64
@pytest.mark.parametrize("op", OPERATORS)
def test_gradcheck_in_float32(op):
    x = draw(1, 6, H=1, K=3, V=2, dtype=torch.float32)
    assert torch.autograd.gradcheck(flat(op, x), tuple(leaves(x).values()), eps=1e-3, atol=1e-2)


# ---- against autograd through the recurrence, for whatever shape hypothesis thinks of

@settings(max_examples=25, deadline=None)
@given(lens=st.lists(st.integers(0, 70), min_size=1, max_size=4), H=st.integers(1, 2), group=st.integers(1, 3),
       K=st.integers(1, 9), V=st.integers(1, 9), C=st.sampled_from([32, 64]), seed=st.integers(0, 99))
def test_packed_gradients(lens, H, group, K, V, C, seed):
    x = draw(1, sum(lens), H=H, K=K, V=V, HV=H * group, N=len(lens), seed=seed)
    cu_seqlens, got = borders(lens), leaves(x)
    o, S = kl.chunk_kda(**got, output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=C)
    do, dS = torch.randn_like(o), torch.randn_like(S)
    torch.autograd.backward((o, S), (do, dS))
    for n, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
        if a == b: assert torch.equal(got["initial_state"].grad[n], dS[n]); continue
        one = {name: x[name][:, a:b] for name in NAMES} | dict(initial_state=x["initial_state"][n:n + 1])
        want = gradients(kl.naive_recurrent_kda, one, do[:, a:b], dS[n:n + 1])
        for name in NAMES: assert distance(got[name].grad[:, a:b], want[name]) < 1e-9, name
        assert distance(got["initial_state"].grad[n:n + 1], want["initial_state"]) < 1e-9


@pytest.mark.parametrize("options", [dict(cu_seqlens=borders([40, 0, 61, 1])), {}], ids=["packed", "batch"])
def test_tokens_and_chunks_agree(options):
    B, T, N = (1, 102, 4) if options else (2, 102, 2)
    x = draw(B, T, H=2, K=12, V=20, HV=4, N=N)
    do, dS = torch.randn(B, T, 4, 20, dtype=F64), torch.randn(N, 4, 12, 20, dtype=F64)
    pair = [gradients(op, x, do, dS, use_qk_l2norm_in_kernel=True, **options) for op in OPERATORS]
    for name in x: assert distance(pair[0][name], pair[1][name]) < 1e-12, name


# ---- options say the same thing in another way

@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("op", OPERATORS)
def test_gates_inside_are_gates_outside(op, lower_bound):
    x = draw(2, 70, H=2, K=8, V=8, HV=4)
    A_log, dt_bias, raw = torch.rand(4, dtype=F64), torch.randn(32, dtype=F64), 3 * torch.randn_like(x["g"])
    strength = torch.randn_like(x["beta"])
    inside = op(**x | dict(g=raw, beta=strength), use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
                use_beta_sigmoid_in_kernel=True, lower_bound=lower_bound, output_final_state=True)
    g, beta = kl.fused_kda_gate(raw.flatten(-2), A_log, 8, dt_bias, strength, lower_bound=lower_bound)
    outside = op(**x | dict(g=g, beta=beta), output_final_state=True)
    for a, b in zip(inside, outside): assert distance(a, b) < 1e-14


@pytest.mark.parametrize("op", OPERATORS)
def test_state_v_first(op):
    x = draw(2, 40, K=6, V=9)
    o, S = op(**x, output_final_state=True)
    turned = op(**x | dict(initial_state=x["initial_state"].mT.contiguous()), state_v_first=True, output_final_state=True)
    assert distance(turned[0], o) < 1e-14 and distance(turned[1], S.mT) < 1e-14


def test_intermediate_states_are_the_states():
    x = draw(2, 150, K=6, V=9)
    o, S, h = kl.chunk_kda(**x, output_final_state=True, return_intermediate_states=True)
    assert h.shape == (2, 3, 2, 6, 9) and torch.equal(h[:, 0], x["initial_state"])
    for i in (1, 2):
        start = {name: x[name][:, :64 * i] for name in NAMES} | dict(initial_state=x["initial_state"])
        assert distance(h[:, i], kl.naive_recurrent_kda(**start, output_final_state=True)[1]) < 1e-12


def test_keeping_more_changes_no_gradient():
    x = draw(2, 100, K=6, V=9)
    do, dS = torch.randn(2, 100, 2, 9, dtype=F64), torch.randn(2, 2, 6, 9, dtype=F64)
    kept, again = (gradients(kl.chunk_kda, x, do, dS, disable_recompute=flag) for flag in (True, False))
    for name in x: assert torch.equal(kept[name], again[name])


def test_gradient_of_the_final_state_alone():
    x = draw(1, 100)
    dS = torch.randn(1, 2, 16, 16, dtype=F64)
    zero = torch.zeros_like(x["v"])
    got, want = (gradients(op, x, zero, dS) for op in (kl.chunk_kda, kl.naive_recurrent_kda))
    for name in x: assert distance(got[name], want[name]) < 1e-11 or not want[name].any(), name


# ---- limits: the family

def test_one_decay_a_head_is_gated_deltanet():
    "S = α (I − β k kᵀ) S + β k vᵀ, with explicit matrices."
    x = draw(1, 30, H=1, K=5, V=4)
    g, S, I = x["g"][..., 0], x["initial_state"][0, 0], torch.eye(5, dtype=F64)
    want = []
    for t in range(30):
        k, v, b = x["k"][0, t, 0], x["v"][0, t, 0], x["beta"][0, t, 0]
        S = g[0, t, 0].exp() * (I - b * torch.outer(k, k)) @ S + b * torch.outer(k, v)
        want.append(x["q"][0, t, 0] @ S)
    for op in SCALAR: assert distance(op(**x | dict(g=g), scale=1.)[0][0, :, 0], torch.stack(want)) < 1e-13


def test_without_decay_a_repeated_key_is_overwritten():
    "DeltaNet: with β = 1 the memory answers with the last value written under a key, exactly."
    k = torch.nn.functional.normalize(torch.randn(5, dtype=F64), dim=0).expand(1, 70, 1, 5)
    v, g = torch.randn(1, 70, 1, 4, dtype=F64), torch.zeros(1, 70, 1, 5, dtype=F64)
    o, _ = kl.chunk_kda(k, k, v, g, torch.ones(1, 70, 1, dtype=F64), scale=1.)
    assert distance(o, v) < 1e-12


@pytest.mark.parametrize("op", OPERATORS + SCALAR)
def test_without_decay_it_is_deltanet(op):
    "S = (I − β k kᵀ) S + β k vᵀ, with explicit matrices."
    x = draw(1, 70, H=1, K=5, V=4, decay=0.)
    S, I, want = x["initial_state"][0, 0], torch.eye(5, dtype=F64), []
    for q, k, v, b in zip(*(x[name][0, :, 0] for name in ("q", "k", "v", "beta"))):
        S = (I - b * torch.outer(k, k)) @ S + b * torch.outer(k, v)
        want.append(q @ S)
    if op in SCALAR: x["g"] = x["g"][..., 0]
    o, got_S = op(**x, scale=1., output_final_state=True)
    assert distance(o[0, :, 0], torch.stack(want)) < 1e-13 and distance(got_S[0, 0], S) < 1e-13


def gated_linear_attention(q, k, v, g, beta, initial_state):
    "S = Diag(α) S + β k vᵀ: nothing is looked up before it is written."
    S, out = initial_state[0, 0], []
    for q, k, v, g, b in zip(*(x[0, :, 0] for x in (q, k, v, g, beta))):
        S = g.exp()[:, None] * S + b * torch.outer(k, v)
        out.append(q @ S)
    return torch.stack(out), S


def test_without_the_erase_term_the_pieces_are_gated_linear_attention():
    "Tokens that take nothing out (w = 0) and put in what they have (u = β v): what is left of the chain."
    x = draw(1, 150, H=1, K=8, V=5)
    G = kl.chunk_local_cumsum(x["g"], 64, output_dtype=F64)
    Aqk, Akk = kl.chunk_kda_fwd_intra(x["q"], x["k"], G, 0 * x["beta"], 1., output_dtype=F64)   # nothing erased: the identity
    w, u, _, kg = kl.recompute_w_u_fwd(x["k"], x["v"], x["beta"], Akk, x["q"], G)
    h, v_new, S = kl.chunk_gated_delta_rule_fwd_h(kg, 0 * w, u, gk=G, initial_state=x["initial_state"], output_final_state=True)
    o, (want, want_S) = kl.chunk_gla_fwd_o_gk(x["q"], v_new, G, Aqk, h, 1.), gated_linear_attention(**x)
    assert distance(o[0, :, 0], want) < 1e-13 and distance(S[0, 0], want_S) < 1e-13


@pytest.mark.parametrize("op", OPERATORS)
def test_weak_writes_of_large_values_tend_to_gated_linear_attention(op):
    "β v stays, β k kᵀ goes: as β falls by ten, so does the distance."
    x = draw(1, 70, H=1, K=8, V=5)
    x["initial_state"] = torch.zeros_like(x["initial_state"])
    want, _ = gated_linear_attention(**x)
    far = [distance(op(**x | dict(v=x["v"] / weak, beta=weak * x["beta"]), scale=1.)[0][0, :, 0], want)
           for weak in (1e-3, 1e-4)]
    assert far[0] < 2e-3 and 9.9 < far[0] / far[1] < 10.1


def test_orthogonal_keys_make_it_gated_linear_attention():
    "Nothing to correct: o_t = Σ_i (q_t ⊙ k_i ⊙ e^(G_t − G_i)) β_i v_i."
    x = draw(1, 40, H=1, K=40, V=3, N=1)
    k = torch.eye(40, dtype=F64)[None, :, None]
    x |= dict(k=k, initial_state=torch.zeros(1, 1, 40, 3, dtype=F64))
    G = x["g"][0, :, 0].cumsum(0)
    decays = (G[:, None] - G[None]).clamp(max=0).exp()
    scores = torch.einsum("tk,ik,tik->ti", x["q"][0, :, 0], k[0, :, 0], decays).tril()
    want = scores @ (x["beta"][0, :, :] * x["v"][0, :, 0])
    assert distance(kl.chunk_kda(**x, scale=1.)[0][0, :, 0], want) < 1e-13


# ---- bad combinations of options

X = draw(1, 7, H=2, K=4, V=4)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("options, words", [
    (dict(A_log=torch.zeros(2)), ("`A_log`", "use_gate_in_kernel=True")),
    (dict(lower_bound=-5.), ("`lower_bound`", "use_gate_in_kernel=True")),
    (dict(use_gate_in_kernel=True), ("`A`", "`lower_bound`")),
    (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), ("`A`", "[2]", "[3]")),
    (dict(use_gate_in_kernel=True, A_log=torch.zeros(2), dt_bias=torch.zeros(7)), ("`g_bias`", "[8]", "[7]")),
    (dict(use_gate_in_kernel=True, A_log=torch.zeros(2), lower_bound=5.), ("`lower_bound`", "below 0", "5.0")),
    (dict(use_gate_in_kernel=True, A_log=torch.zeros(2), safe_gate=True), ("`lower_bound`", "safe_gate=True")),
    (dict(allow_neg_eigval=True), ("`allow_neg_eigval`", "use_beta_sigmoid_in_kernel=True")),
    (dict(state_v_first=True, initial_state=torch.zeros(1, 2, 4, 5)), ("`initial_state`", "[1, 2, 4, 4]")),
], ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_options_that_do_not_fit(op, options, words):
    with pytest.raises(ValueError) as caught: op(**X | options)
    for word in words: assert word in str(caught.value)


@pytest.mark.parametrize("op", SCALAR)
def test_scalar_gate_of_the_wrong_shape(op):
    with pytest.raises(ValueError) as caught: op(**X)
    assert "`g`" in str(caught.value) and "[1, 7, 2, 4]" in str(caught.value)


# ---- the trace

def test_trace_names_what_was_computed():
    x = draw(1, 130, K=6, V=9)
    trace = kl.trace_kda(**x)
    assert torch.equal(trace["o"], kl.chunk_kda(**x)[0])
    assert distance(trace["u"] - torch.einsum("bthk,bthkv->bthv", trace["w"], trace["h"].repeat_interleave(64, 1)[:, :130]),
                    trace["v_new"]) < 1e-12
    assert "Akk" in repr(trace) and "[1, 130, 2, 64]" in repr(trace)
