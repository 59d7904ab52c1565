"""`chunk_kda` on every backend against the recurrence in float64: values, states and gradients, small shapes and hard cases."""
import pytest
import torch

from conftest import DEVICE
from helpers import borders, distance, draw, recurrence_packed
from kda_lit import KimiDeltaAttention, chunk_kda, fused_recurrent_kda, naive_chunk_kda, naive_recurrent_kda, trace_kda

F64 = torch.float64
SHAPES = [  # B, T, H, HV, K, V: a token, borders of a chunk, and sizes that are no powers of two
    (3, 1, 1, 1, 16, 16), (1, 63, 1, 1, 60, 100), (1, 64, 1, 1, 16, 128), (1, 65, 1, 1, 100, 16), (1, 130, 1, 1, 16, 60),
    (2, 5, 1, 2, 16, 16), (1, 9, 1, 1, 128, 256), (1, 9, 1, 1, 256, 60)]


def everything(op, x, do, dS, **options):
    "Outputs, final states and all gradients of an operator."
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    o, S = op(**x, output_final_state=True, **options)
    grads = torch.autograd.grad((o, S), list(x.values()), (do, dS.to(S.dtype)))
    return dict(o=o, S=S) | {f"d{name}": t for name, t in zip(x, grads)}


def compare(backend, x, want_op=naive_recurrent_kda, tol=64, options=None, **both):
    "Each within `tol` roundings of the float64 result, relative to its largest entry."
    x = {name: backend.rounded(t) for name, t in x.items()}
    do, dS = (backend.rounded(torch.randn(t.shape)) for t in (x["v"], x["initial_state"]))
    got = backend(everything, chunk_kda, x, do, dS, **both | (options or {}))
    want = everything(want_op, x, do, dS, **both)
    for name in want: assert distance(got[name].cpu(), want[name]) < tol * backend.eps, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(every_backend, shape):
    "In half precision, each result is rounded once, and states are float32."
    B, T, H, HV, K, V = shape
    compare(every_backend, draw(B, T, H, K, V, HV), tol=2 if every_backend.dtype.itemsize == 2 else 64)


def test_small_chunks(backend): compare(backend, draw(1, 70, 1, 16, 16), options=dict(chunk_size=32))


def test_scale(backend): compare(backend, draw(1, 20, 1), scale=-2.0)


def test_ragged(backend):
    "Empty sequences hand their states and their states' gradients through."
    cu_seqlens = borders([0, 1, 33, 0, 2])
    alone = lambda output_final_state, **x: recurrence_packed(x, cu_seqlens)
    compare(backend, draw(1, 36, 1, 12, 20, 2, N=5), alone, options=dict(cu_seqlens=cu_seqlens, chunk_size=32))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [chunk_kda, fused_recurrent_kda], ids=["chunk", "recurrent"])
def test_borders_on_the_cpu(op, dtype):
    "Borders may lie where the tensors do not: the same values, the same gradients."
    x, cu_seqlens = {name: t.to(DEVICE, dtype) for name, t in draw(1, 70, 1, 32, 32, 2, N=3).items()}, borders([33, 0, 37])
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    here, there = (everything(op, x, do, dS, cu_seqlens=cu) for cu in (cu_seqlens, cu_seqlens.to(DEVICE)))
    for name in here: assert distance(here[name], there[name]) < 1e-6, name


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_borders_of_a_layer_on_the_cpu():
    layer, x = KimiDeltaAttention(32, head_dim=16, num_heads=2).to(DEVICE), torch.randn(1, 9, 32, device=DEVICE)
    here, there = (layer(x, cu_seqlens=cu)[0] for cu in (borders([4, 5]), borders([4, 5]).to(DEVICE)))
    assert distance(here, there) < 1e-6


def test_no_tokens(backend):
    x = draw(2, 0, V=24)
    o, S = backend(chunk_kda, **x, output_final_state=True)
    assert o.shape == (2, 0, 2, 24) and torch.equal(S.cpu().double(), backend.rounded(x["initial_state"]))
    o, S = backend(chunk_kda, **draw(1, 0, N=2), output_final_state=True, cu_seqlens=borders([0, 0]))
    assert o.numel() == 0 and S.shape == (2, 2, 16, 16)


STEPS = torch.tensor([0., -1., -80., -500.])
DECAYS = {f"{d:g}": d for d in STEPS.tolist()} | {
    "mixed": STEPS[torch.randint(4, (1, 70, 1, 16), generator=torch.Generator().manual_seed(1))],
    "by token": STEPS[torch.arange(70) % 4][:, None, None], "by channel": STEPS[torch.arange(16) % 4],
    "one cut": -500. * (torch.arange(70) == 40)[:, None, None]}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_decays(backend, decay): compare(backend, draw(1, 70, 1, 16, 8, decay=decay))


@pytest.mark.parametrize("beta", [1., 2.])
@pytest.mark.parametrize("noise", [0., 1e-3])
def test_duplicate_keys(backend, noise, beta):
    "beta = 2 mirrors: rounding stays forever, so the measure is the same chunks with a dense solver in the same precision."
    x = draw(1, 70, 1, decay=0.)
    x["k"] = torch.nn.functional.normalize(x["k"][:, :1] + noise * x["k"], dim=-1)
    x["beta"].fill_(beta)
    x = {name: backend.rounded(t) for name, t in x.items()}
    do, dS = (backend.rounded(torch.randn(t.shape)) for t in (x["v"], x["initial_state"]))
    got, want = backend(everything, chunk_kda, x, do, dS), everything(naive_recurrent_kda, x, do, dS)
    plain = backend._replace(name="torch")(everything, naive_chunk_kda, x, do, dS)
    for name in want:
        allowed = 10 * distance(plain[name].cpu(), want[name]) + 64 * backend.eps
        assert distance(got[name].cpu(), want[name]) < allowed, name


RAW = dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
OPTIONS = {"unit keys": dict(use_qk_l2norm_in_kernel=True), "V first": dict(state_v_first=True),
           "kept": dict(disable_recompute=True, use_qk_l2norm_in_kernel=True), "softplus": RAW,
           "bounded": RAW | dict(lower_bound=-5.0, safe_gate=True, allow_neg_eigval=True)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend, options):
    "Against the same options in float64; tests/test_backward.py says that those are right."
    x = draw(1, 70, 1, 16, 12, 2)
    if "use_gate_in_kernel" in options: x |= dict(A_log=torch.rand(2).double(), dt_bias=torch.randn(32).double())
    if "state_v_first" in options: x["initial_state"] = x["initial_state"].mT
    compare(backend, x, chunk_kda, 128, **options)


def test_states_on_entry(backend):
    "The first is the initial state; the next is what the same tokens leave, when nothing follows them."
    x = draw(1, 70, 1, 16, 12)
    h = backend(chunk_kda, **x, return_intermediate_states=True)[2].cpu()
    start = {name: t if name == "initial_state" else t[:, :64] for name, t in x.items()}
    assert torch.equal(h[:, 0].double(), backend.rounded(x["initial_state"]))
    assert distance(h[:, 1], naive_recurrent_kda(**start, output_final_state=True)[1]) < 64 * backend.eps


def spread(t):
    "The same numbers, two apart in memory and with the last two axes swapped."
    return torch.stack([t, t.neg()], -1).transpose(-2, -3).contiguous().transpose(-2, -3)[..., 0]


def test_strided_inputs(backend):
    "Laid out like this where they are computed; and a gradient that arrives expanded, as that of a sum does."
    x = draw(1, 20, 2, 16, 12)
    strided = lambda **x: chunk_kda(**{name: spread(t) for name, t in x.items()}, output_final_state=True)
    a, b = backend(lambda **x: chunk_kda(**x, output_final_state=True), **x), backend(strided, **x)
    for s, t in zip(a, b): assert torch.equal(s, t)
    x = {name: t.requires_grad_() for name, t in backend.put(x).items()}
    o, S = backend(chunk_kda, **x, output_final_state=True)
    sums = torch.autograd.grad(o.sum() + S.sum(), list(x.values()), retain_graph=True)
    ones = torch.autograd.grad((o, S), list(x.values()), (torch.ones_like(o), torch.ones_like(S)))
    for s, t in zip(sums, ones): assert torch.equal(s, t)


@pytest.mark.parametrize("at", [1, 40, 64])
def test_causality(backend, at):
    "Bit for bit, whatever comes later."
    x = draw(1, 70, 1)
    y = {name: t.clone() for name, t in x.items()}
    for name, new in dict(q=3., k=-2., v=9., g=-500., beta=0.5).items(): y[name][:, at:] = new
    (o, _), (o_y, _) = (backend(chunk_kda, **t) for t in (x, y))
    assert torch.equal(o[:, :at], o_y[:, :at]) and not torch.equal(o[:, at:], o_y[:, at:])


def test_trace(backend):
    x = draw(1, 70, 1, 16, 12)
    trace, want = backend(trace_kda, **x), trace_kda(**{name: backend.rounded(t) for name, t in x.items()})
    for name in want: assert distance(trace[name].cpu(), want[name]) < 64 * backend.eps, name
