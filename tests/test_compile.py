"""What a compiler makes of the operators and layers: one graph without a break, and the same numbers.

Compilation happens without a code generator (aot_eager), which traces and partitions like the real one; one test goes all
the way. Shapes are small: what is compiled around an operator does not depend on them, and inside it nothing is compiled.
"""
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import kda_lit as kl
from conftest import DEVICE
from helpers import borders, cast, distance, draw

LENS = [5, 0, 3, 1]
SETTINGS = {  # sizes, packed lengths, initial state
    "plain": (dict(B=2, T=9), None, False), "state": (dict(B=2, T=9), None, True),
    "packed": (dict(B=1, T=9, H=1, HV=2), LENS, False), "packed state": (dict(B=1, T=9, H=1, HV=2), LENS, True),
}
settings = pytest.mark.parametrize("sizes, lens, state", SETTINGS.values(), ids=SETTINGS)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
EAGER = dict(backend="aot_eager", fullgraph=True)
SAME = 0 if DEVICE == "cpu" else 1e-6     # calls without gradients have kernels of their own on a GPU, but not in a graph


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(sizes, lens=None, state=True, **more):
    "Float32 tensors by name, and cu_seqlens."
    x = draw(**sizes, N=len(lens) if lens else None, dtype=torch.float32, **more)
    if not state: del x["initial_state"]
    return {name: t.to(DEVICE) for name, t in x.items()}, borders(lens).to(DEVICE) if lens else None


def results(f, x):
    "Tensors that f makes of a dictionary, and their gradients, weighed at random."
    x = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    outputs = [y for y in tree_leaves(f(x)) if isinstance(y, torch.Tensor)]
    random = torch.Generator().manual_seed(1)
    d = [torch.randn(y.shape, generator=random).to(y) for y in outputs]
    loss = sum((y * dy).sum() for y, dy in zip(outputs, d) if y.requires_grad)
    return outputs, torch.autograd.grad(loss, list(x.values()))


def same(f, x, tol=0., **how):
    "Compiled and plain: the same values and gradients, and the same tensors carry a gradient."
    (got, dgot), (want, dwant) = (results(g, x) for g in (torch.compile(f, **EAGER | how), f))
    assert [y.requires_grad for y in got] == [y.requires_grad for y in want]
    for a, b in zip((*got, *dgot), (*want, *dwant)): assert distance(a, b) <= tol


# ---- the operators

OPERATORS = {"chunk_kda": kl.chunk_kda, "fused_recurrent_kda": kl.fused_recurrent_kda}
operators = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)


@operators
@settings
def test_operators(op, sizes, lens, state):
    x, cu = inputs(sizes, lens, state)
    same(lambda x: op(**x, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu), x)


@operators
def test_operators_in_triton(op):
    x, cu = inputs(*SETTINGS["packed state"])
    with kl.use_backend("triton"): same(lambda x: op(**x, output_final_state=True, cu_seqlens=cu), x)


@pytest.mark.parametrize("op", [kl.chunk_gated_delta_rule, kl.fused_recurrent_gated_delta_rule],
                         ids=["chunk", "fused_recurrent"])
def test_gated_delta_rule(op):
    x, _ = inputs(dict(B=2, T=9))
    x["g"] = x["g"][..., 0].contiguous()
    same(lambda x: op(**x, output_final_state=True), x)


@operators
def test_every_option(op):
    "Raw gates, raw strengths, states turned over."
    x, _ = inputs(dict(B=2, T=9))
    x |= dict(A_log=torch.randn(2, device=DEVICE), dt_bias=torch.randn(32, device=DEVICE))
    raw = dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    for bound in (None, -5.):
        same(lambda x: op(**x, **raw, lower_bound=bound, output_final_state=True, state_v_first=True), x)


@pytest.mark.parametrize("lens", [None, LENS], ids=["batch", "packed"])
def test_states_between_chunks(lens):
    "As many as there are chunks, although a compiler only knows how many there may be."
    x, cu = inputs(dict(B=1, T=9), lens)
    same(lambda x: kl.chunk_kda(**x, cu_seqlens=cu, chunk_size=32, return_intermediate_states=True,
                                disable_recompute=True), x)


def test_small_operators():
    x = dict(x=torch.randn(3, 5, device=DEVICE))
    same(lambda x: kl.l2norm(**x), x)
    x |= dict(g=torch.randn(3, 5, device=DEVICE))
    same(lambda x: kl.rms_norm_gated(**x, weight=None), x)


def other_length(f, x_of):
    "How many graphs it takes for four lengths, the values compared at each."
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=graphs, fullgraph=True)
    for T in (20, 31, 44, 70): assert distance(compiled(x_of(T)), f(x_of(T))) <= SAME
    return graphs.frame_count


@operators
def test_lengths_are_not_compiled_in(op):
    "The second length brings a graph for all of them."
    x_of = lambda T: inputs(dict(B=2, T=T), None, False)[0]
    assert other_length(lambda x: op(**x)[0], x_of) == 2
    x_of = lambda T: inputs(dict(B=1, T=T), None, False)[0] | dict(cu_seqlens=borders([3] * (T // 3) + [T % 3]).to(DEVICE))
    assert other_length(lambda x: op(**x)[0], x_of) == 2


@operators
def test_nothing_is_kept_without_gradients(op):
    x, _ = inputs(dict(B=2, T=9))
    with torch.no_grad(): same_values = torch.compile(lambda x: op(**x)[0], **EAGER)(x)
    assert not same_values.requires_grad and distance(same_values, op(**x)[0]) <= SAME


@pytest.mark.parametrize("cu, words", [([0, 7, 5, 9], "non-decreasing"), ([0, 8], "T = 9"), ([1, 9], "0 at its start")])
@operators
def test_borders_are_checked_when_it_runs(op, cu, words):
    x, _ = inputs(dict(B=1, T=9), None, False)
    f = torch.compile(lambda x, cu: op(**x, cu_seqlens=cu)[0], **EAGER)
    f(x, torch.tensor([0, *[9] * (len(cu) - 1)]))
    with pytest.raises(ValueError, match=words): f(x, torch.tensor(cu))


@operators
def test_shapes_are_checked_when_it_is_compiled(op):
    x, _ = inputs(dict(B=1, T=9), None, False)
    with pytest.raises(Exception, match="`beta` must be of shape"):
        torch.compile(lambda x: op(**x)[0], **EAGER)(x | dict(beta=x["beta"][:, :-1]))


# ---- who computes

@backends
def test_the_backend_is_chosen_at_run_time_and_kept(backend, monkeypatch):
    "Compiled under no choice; the backward pass runs where the forward pass ran, also in a thread of its own."
    x, _ = inputs(dict(B=1, T=5), None, False)
    x = {name: t.requires_grad_() for name, t in x.items()}
    f = torch.compile(lambda x: kl.fused_recurrent_kda(**x)[0], **EAGER)
    f(x).sum().backward()
    import kda_lit.kernels
    ran = []
    for name in ("recurrent_fwd_triton", "recurrent_bwd_triton"):
        kernel = getattr(kda_lit.kernels, name)
        monkeypatch.setattr(kda_lit.kernels, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    with kl.use_backend(backend): o = f(x)
    walk = threading.Thread(target=o.sum().backward)
    walk.start(), walk.join()
    assert ran == (["recurrent_fwd_triton", "recurrent_bwd_triton"] if backend == "triton" else [])


# ---- as PyTorch checks custom operators

def call(op, sizes, lens, state):
    "Positional arguments of the custom operator."
    x, cu = inputs(sizes, lens, state)
    q, k, v, g, beta = (x[name].requires_grad_() for name in ("q", "k", "v", "g", "beta"))
    S = x["initial_state"].requires_grad_() if state else None
    tail = () if op == "fused_recurrent_kda" else (64, False)
    return True, q, k, v, g, beta, 0.5, S, True, cu, *tail


@pytest.mark.parametrize("name", OPERATORS)
@settings
def test_opcheck(name, sizes, lens, state):
    "An empty sequence leaves a room for a kept state empty, and PyTorch would compare what happens to lie there."
    if lens and name == "fused_recurrent_kda": lens = [5, 3, 1]
    torch.library.opcheck(getattr(torch.ops.kda_lit, name).default, call(name, sizes, lens, state))


def leaf(*shape): return torch.randn(shape, device=DEVICE, requires_grad=True)


SMALL = {  # name, arguments
    "gate": ("kda_gate", lambda: (leaf(2, 3, 8), leaf(2), 4, leaf(8), leaf(2, 3, 2), 1., 20., None)),
    "bounded gate": ("kda_gate", lambda: (leaf(2, 3, 8), None, 4, None, None, 1., 20., -5.)),
    "norm": ("rms_norm_gated", lambda: (leaf(2, 3, 8), leaf(2, 3, 8), leaf(8), leaf(8), "swish", 1e-5, torch.float32)),
    "bare norm": ("rms_norm_gated", lambda: (leaf(2, 3, 8), leaf(2, 3, 8), None, None, "sigmoid", 1e-5, torch.float32)),
    "convolution": ("short_conv", lambda: (leaf(2, 5, 6), leaf(6, 1, 4), leaf(6), leaf(2, 6, 4), None, True, torch.float32)),
    "packed convolution": ("short_conv", lambda: (leaf(1, 9, 6), leaf(6, 1, 4), None, leaf(4, 6, 4),
                                                  borders(LENS).to(DEVICE), False, torch.float32)),
    "one token": ("short_conv", lambda: (leaf(3, 1, 6), leaf(6, 1, 4), None, leaf(3, 6, 4), None, True, torch.float32)),
    "unit length": ("l2norm", lambda: (leaf(2, 3, 8), 1e-6, None)),
}


@pytest.mark.parametrize("name, arguments", SMALL.values(), ids=SMALL)
def test_opcheck_small(name, arguments):
    torch.library.opcheck(getattr(torch.ops.kda_lit, name).default, (True, *arguments()))


# ---- the layers

LAYERS = {"KDA": kl.KimiDeltaAttention, "GDN": kl.GatedDeltaNet}
layers = pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS)


def small(kind):
    torch.manual_seed(0)
    return kind(24, expand_v=1, head_dim=16, num_heads=1, num_v_heads=2).to(DEVICE)


def step(layer, cu=None):
    "Values, and gradients of the input and of all weights."
    def f(x):
        h = x.pop("hidden_states")
        return torch.func.functional_call(layer, x, (h,), dict(cu_seqlens=cu))[0]
    return lambda x: f(dict(x))


@pytest.mark.parametrize("lens", [None, LENS], ids=["batch", "packed"])
@layers
def test_training(kind, lens):
    layer, cu = small(kind), None if lens is None else borders(lens).to(DEVICE)
    x = dict(layer.named_parameters()) | dict(hidden_states=torch.randn(1 if lens else 2, 9, 24, device=DEVICE))
    same(step(layer, cu), x)


def test_training_in_triton():
    layer = small(kl.KimiDeltaAttention)
    x = dict(layer.named_parameters()) | dict(hidden_states=torch.randn(1, 9, 24, device=DEVICE))
    with kl.use_backend("triton"): same(step(layer, borders(LENS).to(DEVICE)), x)


@layers
def test_lengths_are_not_compiled_into_layers(kind):
    layer = small(kind)
    x_of = lambda T: (torch.ones(1, T, 24, device=DEVICE), borders([3] * (T // 3) + [T % 3]).to(DEVICE))
    assert other_length(lambda x: layer(x[0], cu_seqlens=x[1])[0], x_of) == 2


@layers
def test_evaluation_and_decoding(kind):
    layer = small(kind).eval()
    x, y = torch.randn(2, 2, 9, 24, device=DEVICE)
    with torch.no_grad():
        f = torch.compile(lambda x, cache: layer(x, past_key_values=cache, use_cache=True), **EAGER)
        assert distance(torch.compile(layer, **EAGER)(x)[0], layer(x)[0]) <= SAME
        (_, _, one), (_, _, two) = f(x, None), layer(x, use_cache=True)
        for t in range(4):
            a, b = f(y[:, t:t + 1], one), layer(y[:, t:t + 1], past_key_values=two, use_cache=True)
            assert distance(a[0], b[0]) <= SAME and a[2] is one and one.get_seq_length() == 10 + t
    assert distance(one[0]["recurrent_state"], two[0]["recurrent_state"]) <= SAME


def test_all_the_way():
    "Through the code generator, which may round otherwise."
    layer = small(kl.KimiDeltaAttention)
    x = dict(layer.named_parameters()) | dict(hidden_states=torch.randn(1, 9, 24, device=DEVICE))
    same(step(layer, borders(LENS).to(DEVICE)), x, 1e-5, backend="inductor")


# ---- autocast

AUTOCAST = {name: getattr(kl, name) for name in ("chunk_kda", "fused_recurrent_kda", "chunk_gated_delta_rule",
                                                 "fused_recurrent_gated_delta_rule")}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_kept_out(name, compiled):
    "Float32 stays float32, forward and backward, also where the backward pass runs under autocast."
    op, (x, _) = AUTOCAST[name], inputs(dict(B=2, T=9))
    if "gated_delta" in name: x["g"] = x["g"][..., 0].contiguous()
    f = lambda x: op(**x, output_final_state=True)
    want, dwant = results(f, x)
    if compiled: f = torch.compile(f, **EAGER)
    with torch.autocast(DEVICE, torch.bfloat16): got, dgot = results(f, x)
    for a, b in zip((*got, *dgot), (*want, *dwant)): assert a.dtype == b.dtype and distance(a, b) < 1e-6


def test_autocast_is_kept_out_of_pieces():
    "One after the other, as a reader of the pieces' pages would chain them."
    x, _ = inputs(dict(B=2, T=9), None, False)
    def chain(q, k, v, g, beta):
        G = kl.chunk_local_cumsum(g, 32)
        Aqk, Akk = kl.chunk_kda_fwd_intra(q, k, G, beta, 0.5, chunk_size=32)
        w, u, _, kg = kl.recompute_w_u_fwd(k, v, beta, Akk, None, G)
        h, v_new, S = kl.chunk_gated_delta_rule_fwd_h(kg, w, u, gk=G, output_final_state=True, chunk_size=32)
        o = kl.chunk_gla_fwd_o_gk(q, v_new, G, Aqk, h, 0.5, chunk_size=32)
        return [o, S, kl.chunk_gla_bwd_dA(v, o, 0.5, chunk_size=32), kl.chunk_bwd_dv_local(q, k, o, A=Aqk, chunk_size=32),
                *kl.chunk_kda_bwd_dqkwg(q, k, w, v_new, h, G, o, h, v_new, 0.5, chunk_size=32),
                kl.solve_tril(Aqk.tril(-1))]
    want = chain(**x)
    with torch.autocast(DEVICE, torch.bfloat16): got = chain(**x)
    for a, b in zip(got, want): assert a.dtype == b.dtype and distance(a, b) == 0
