"""Gradients of `chunk_kda` by fused kernels: against autograd through the recurrence, or through chunks, in float64.

As in test_fused.py: without a GPU in the interpreter and in float32, a precision in which these kernels are otherwise not used;
with one in half precision, where errors in the norm must stay below those that rounding makes.
"""
import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICE
from helpers import borders, draw, gradients
from kda_lit import chunk_kda, naive_recurrent_kda
from kda_lit.chunk import whole_sizes
from kda_lit.utils import use_backend
from test_fused import backend, cut  # noqa: F401: the fixture

pytest.importorskip("triton")
import kda_lit.kernels as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")     # what overflows is computed once more

SMALL = dict(K=32, V=32)
GATE = dict(use_gate_in_kernel=True)
RAW = dict(use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)


def raw(B=1, T=40, H=1, K=SMALL["K"], V=SMALL["V"], HV=None, *, gated=True, seed=0, **options):
    "Raw gates, strengths, and queries and keys of any length; parameters of the gate."
    x, random = draw(B, T, H, K, V, HV, seed=seed, **options), torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(size, generator=random, dtype=torch.float64)
    x["q"], x["k"], x["beta"] = 3 * new(*x["q"].shape), 3 * new(*x["k"].shape), new(*x["beta"].shape)
    if gated: x |= dict(g=new(*x["g"].shape), A_log=new(x["v"].shape[2]).abs(), dt_bias=new(x["g"].shape[2:].numel()))
    return x


def small_ones_fit(monkeypatch):
    "In the interpreter: single precision, any size."
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "fits", lambda *args: True)
        monkeypatch.setattr("kda_lit.chunk.whole_sizes", lambda K, V: True)


def check(backend, monkeypatch, x, tol=None, cu_seqlens=None, **options):
    "Every gradient that fused kernels give."
    small_ones_fit(monkeypatch)
    calls, bwd = [], kernels.fused_backward
    monkeypatch.setattr(kernels, "fused_backward", lambda *args: calls.append(1) or bwd(*args))
    single = {"initial_state", "A_log", "dt_bias"}
    x = {name: t.float().double() if name in single else backend.rounded(t) for name, t in x.items()}
    put = {name: t.to(DEVICE, torch.float32 if name in single else backend.dtype) for name, t in x.items()}
    random = torch.Generator().manual_seed(7)
    loss = 256 if backend.dtype == torch.float16 else 1                  # its smallest numbers are not small enough otherwise
    do = backend.rounded(loss * torch.randn(x["v"].shape, generator=random))
    dS = loss * torch.randn(x["initial_state"].shape, generator=random)
    options = RAW | (GATE if "A_log" in x else {}) | options
    with use_backend("torch"): want = gradients(chunk_kda, x, do, dS, cu_seqlens=cu_seqlens, **options)
    with use_backend("triton"): got = gradients(chunk_kda, put, do.to(DEVICE), dS.to(DEVICE), cu_seqlens=cu_seqlens, **options)
    assert calls, "fused kernels were not used"
    tol = tol or {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}[backend.dtype]
    for name in want:
        assert got[name].dtype == put[name].dtype and got[name].shape == want[name].shape
        terms = {"g": 0.1 * x["k"] * want["k"], "A_log": x["g"] * want["g"] * (backend.dtype != torch.float32),    # of sums that may cancel
                 "initial_state": torch.finfo(backend.dtype).tiny * do}.get(name, torch.zeros(1))     # of numbers too small for their type
        error = (got[name].double().cpu() - want[name]).norm() / want[name].norm().clamp(min=terms.norm().clamp(min=1e-30))
        assert got[name].isfinite().all() and error < tol, f"d{name} is off by {error:.1e}"
    return got


SHAPES = [(1, 1, 1, 1, 32, 32), (1, 33, 1, 1, 128, 64), (2, 70, 1, 2, 64, 128), (1, 64, 2, 2, 32, 32), (2, 35, 1, 2, 96, 96), (1, 33, 1, 1, 256, 128),
          (1, 33, 1, 1, 32, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bound", [None, -5.])
def test_shapes(backend, monkeypatch, shape, bound):
    B, T, H, HV, K, V = shape
    check(backend, monkeypatch, raw(B, T, H, K, V, HV), lower_bound=bound)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed(backend, monkeypatch, integers):
    lens = [0, 1, 33, 0, 64, 65, 20, 0]
    check(backend, monkeypatch, raw(1, sum(lens), HV=2, N=len(lens)), cu_seqlens=borders(lens).to(integers), lower_bound=-5.)


@pytest.mark.parametrize("packed", [False, True])
def test_in_stretches(backend, monkeypatch, packed):
    cut(monkeypatch)
    x = raw(2 - packed, 141, HV=2, N=5 if packed else 2)
    check(backend, monkeypatch, x, cu_seqlens=borders([40, 0, 1, 97, 3]) if packed else None, lower_bound=-5.)


STEPS = torch.tensor([0., -0.01, -1., -5., -6., -20., -80., -500.]).double()
DECAYS = {str(d.item()): d for d in STEPS} | {
    "mixed": STEPS[torch.randint(8, (1, 40, 1, SMALL["K"]), generator=torch.Generator().manual_seed(1))],
    "one cut": -500. * (torch.arange(40) == 20).double()[:, None, None], "by channel": STEPS[torch.arange(SMALL["K"]) % 8]}


@pytest.mark.parametrize("decay", DECAYS)
def test_hard_decays(backend, monkeypatch, decay):
    check(backend, monkeypatch, raw(gated=False, decay=DECAYS[decay]))


def given(x):
    "The same with strengths that are given, between 0 and 1."
    return dict(x, beta=x["beta"].sigmoid())


def no_float16(backend):
    if backend.dtype == torch.float16: pytest.skip("the choice leaves given strengths in float16 to the single kernels")


PLAIN, OUTSIDE, DOUBLED = dict(use_beta_sigmoid_in_kernel=False), dict(use_qk_l2norm_in_kernel=False), dict(allow_neg_eigval=True)
INPUTS = {"strengths given": PLAIN, "keys as they are": OUTSIDE, "both": PLAIN | OUTSIDE, "doubled": DOUBLED, "doubled, keys as they are": DOUBLED | OUTSIDE}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(backend, monkeypatch, kind, gated):
    "Strengths made inside or not, keys scaled inside or of any length, up to 2 / |k|² together."
    x, options = raw(gated=gated), INPUTS[kind]
    if not options.get("use_beta_sigmoid_in_kernel", True):
        no_float16(backend)
        x = given(x)
    if not options.get("use_qk_l2norm_in_kernel", True):
        x |= {name: F.normalize(x[name], dim=-1) for name in "qk"}
        if "both" in kind: x["k"], x["beta"] = 4 * x["k"], x["beta"] / 8
    check(backend, monkeypatch, x, **options)


@pytest.mark.parametrize("strength", [1, 2])
def test_keys_that_repeat(backend, monkeypatch, strength):
    "Near-duplicate keys, full strengths, weak decays: where the inverse is largest."
    x = raw(1, 64, gated=False, decay=-0.001)
    x["k"] = torch.ones_like(x["k"]) + 0.05 * torch.randn_like(x["k"])
    x["beta"] = torch.full_like(x["beta"], 4.)
    check(backend, monkeypatch, x, tol=1e-4 if DEVICE == "cpu" else (0.1, 0.3)[strength - 1], allow_neg_eigval=strength == 2)


def test_strengths_that_vanish(backend, monkeypatch):
    "A raw strength so low that its sigmoid is zero: nothing is written, and nothing is divided by it."
    x = raw()
    x["beta"][:, ::3] = -200.
    got = check(backend, monkeypatch, x, lower_bound=-5.)
    assert (got["beta"][:, ::3] == 0).all() and (got["v"][:, ::3] == 0).all()


def test_strengths_of_zero(backend, monkeypatch):
    "Given strengths of zero, or nearly: nothing is written, but it would matter if something were."
    no_float16(backend)
    x = given(raw())
    x["beta"][:, ::3], x["beta"][:, 1::3] = 0, 1e-8
    got = check(backend, monkeypatch, x, **PLAIN)
    assert (got["beta"] != 0).all() and got["v"][:, ::3].norm() < 1e-7 * got["v"].norm()


@pytest.mark.parametrize("options", [dict(A_log=None), dict(dt_bias=None), dict(scale=-0.3)], ids=str)
def test_options(backend, monkeypatch, options):
    x = {name: t for name, t in raw().items() if options.get(name, 0) is not None}
    check(backend, monkeypatch, x, lower_bound=-5., **GATE, **{name: v for name, v in options.items() if v is not None})


def test_layouts(backend, monkeypatch):
    "Inputs and gradients that are not contiguous, states with values first, no initial state, half of the leaves."
    small_ones_fit(monkeypatch)
    x = backend.put(raw(2, 40, 2))
    options, names = RAW | GATE, [n for n in x if n != "initial_state"]
    def run(x, turn=lambda t: t, **more):
        leaves = {n: turn(x[n].detach()).requires_grad_(n not in ("g", "beta")) for n in names}
        with use_backend("triton"): o, S = chunk_kda(**leaves, output_final_state=True, **options, **more)
        S = S.mT if more else S
        (turn(o).square().sum() + S.sum()).backward()
        return [leaves[n].grad for n in names]
    turn = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    for a, b in zip(run(x), run(x, turn, state_v_first=True)):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_state_of_a_graph(backend, monkeypatch):
    "A second derivative is refused, a second backward pass through a kept graph gives the same."
    small_ones_fit(monkeypatch)
    x = {n: t.requires_grad_() for n, t in backend.put(raw()).items()}
    with use_backend("triton"): o, _ = chunk_kda(**x, **RAW, **GATE)
    one, two = (torch.autograd.grad(o.sum(), x["k"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)
    d, = torch.autograd.grad(o.square().sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"): d.sum().backward()


def test_against_the_recurrence(backend, monkeypatch):
    "Not only against chunks: autograd through the definition, gates and norms by hand."
    x = raw(1, 37)
    got = check(backend, monkeypatch, x, lower_bound=-5.)

    def definition(q, k, v, g, beta, A_log, dt_bias, initial_state, output_final_state):
        unit = lambda t: t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        g = -5 * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias.view(g.shape[2:])))
        return naive_recurrent_kda(unit(q), unit(k), v, g, beta.sigmoid(), initial_state=initial_state, output_final_state=True)
    random = torch.Generator().manual_seed(7)
    x = {n: t if n in ("initial_state", "A_log", "dt_bias") else backend.rounded(t) for n, t in x.items()}
    loss = 256 if backend.dtype == torch.float16 else 1
    do = backend.rounded(loss * torch.randn(x["v"].shape, generator=random))
    want = gradients(definition, x, do, loss * torch.randn(x["initial_state"].shape, generator=random).double())
    for name in want:
        error = (got[name].double().cpu() - want[name]).norm() / want[name].norm()
        assert error < (1e-5 if DEVICE == "cpu" else 0.02), f"d{name} is off by {error:.1e}"


def test_memory_that_is_kept():
    "What the backward pass needs beyond inputs and outputs: a state for every 64 tokens."
    if DEVICE == "cpu": pytest.skip("needs a GPU")
    x = {n: t.to(DEVICE, torch.bfloat16).requires_grad_() for n, t in raw(1, 4096, 8, 128, 128, gated=False).items() if n != "initial_state"}
    chunk_kda(**x, **RAW)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    o, _ = chunk_kda(**x, **RAW)
    kept = torch.cuda.memory_allocated() - before - o.nbytes
    assert kept / (4096 * 8) < 780


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("bound", [None, -5.])
@pytest.mark.parametrize("shape", [(2, 1000, 4, 8, 128, 128), (1, 777, 2, 4, 128, 64), (1, 500, 2, 2, 64, 128), (1, 500, 2, 2, 64, 64),
                                   (1, 300, 1, 2, 96, 96), (1, 300, 1, 2, 256, 256), (2, 300, 1, 1, 128, 32)], ids=str)
def test_larger(backend, monkeypatch, shape, bound):
    B, T, H, HV, K, V = shape
    check(backend, monkeypatch, raw(B, T, H, K, V, HV), lower_bound=bound)


@pytest.mark.parametrize("K, V, whole", [(128, 128, True), (64, 32, True), (96, 256, True), (256, 96, True), (60, 64, False), (64, 60, False), (288, 64, False), (0, 64, False)])
def test_sizes(K, V, whole): assert whole_sizes(K, V) == whole


@pytest.mark.parametrize("dtype, strengths, whole", [(torch.bfloat16, False, True), (torch.bfloat16, True, True), (torch.float16, False, True),
                                                     (torch.float16, True, False), (torch.float32, False, False)])
def test_options_that_fit(dtype, strengths, whole): assert kernels.computes_whole_triton(dtype, strengths) == whole


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("learn", [False, True])
def test_under_a_compiler(backend, monkeypatch, packed, learn):
    "One graph, with the operator in it, and the same numbers."
    small_ones_fit(monkeypatch)
    torch._dynamo.reset()
    x, cu = backend.put(raw(1, 40, HV=2, N=2 if packed else 1)), borders([7, 33]).to(DEVICE) if packed else None
    names, graphs = list(x), []

    def f(*tensors): return chunk_kda(**dict(zip(names, tensors)), **RAW, **GATE, output_final_state=True, cu_seqlens=cu, lower_bound=-5.)

    def look(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph
    def run(f):
        leaves = [t.detach().clone().requires_grad_(learn) for t in x.values()]
        o, S = f(*leaves)
        return (o, S, *(torch.autograd.grad((o * o).sum() + S.sum(), leaves) if learn else ()))
    with use_backend("triton"):
        want = run(f)
        for a, b in zip(run(torch.compile(f, backend=look, fullgraph=True)), want): assert torch.equal(a, b)
        for a, b in zip(run(torch.compile(f, backend="aot_eager", fullgraph=True)), want): assert torch.equal(a, b)
    assert len(graphs) == 1 and "kda_whole" in graphs[0]
    torch._dynamo.reset()


@pytest.mark.parametrize("K", [32, 96])
def test_opcheck(backend, monkeypatch, K):
    x = {name: t.requires_grad_() for name, t in backend.put(raw(K=K)).items()}
    args = [x[n] for n in ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")]
    tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    with use_backend("triton"): torch.library.opcheck(torch.ops.kda_lit.kda_whole.default, (True, *args, 0.2, True, None, True, True, False, -5.), test_utils=tests)


@pytest.mark.parametrize("cu_seqlens", [None, borders([0, 0])], ids=["batch", "packed"])
def test_no_token(backend, monkeypatch, cu_seqlens):
    "The final state is the initial one, and so is its gradient; parameters get none."
    small_ones_fit(monkeypatch)
    x = {name: t.requires_grad_() for name, t in backend.put(raw(2 if cu_seqlens is None else 1, 0, N=2)).items()}
    with use_backend("triton"): o, S = chunk_kda(**x, **RAW, **GATE, output_final_state=True, cu_seqlens=cu_seqlens)
    (2 * S.sum() + o.sum()).backward()
    assert (x["initial_state"].grad == 2).all() and not x["A_log"].grad.any() and not x["dt_bias"].grad.any()
