"""`chunk_kda` by two kernels, where no gradient is asked for: against the recurrence in float64.

Without a GPU the interpreter runs the kernels in float32, a precision in which they are otherwise not used. With one they run
in half precision; their error must then be at most that of the recurrence computed in the same half precision.
"""
import pytest
import torch
import torch.nn.functional as F

from conftest import DEVICE, Backend, poisoned
from helpers import borders, distance, draw, recurrence, recurrence_packed
from kda_lit import chunk_kda, naive_recurrent_kda

pytest.importorskip("triton")
import kda_lit.kernels as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")     # what overflows is computed once more

DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def backend(request):
    yield from poisoned(Backend("triton", request.param))


@pytest.fixture
def fused(backend, monkeypatch):
    "chunk_kda(**x, …) there; fails unless the two kernels have computed it."
    calls, forward = [], kernels.fused_forward
    monkeypatch.setattr(kernels, "fits", lambda *args: True)
    monkeypatch.setattr(kernels, "fused_forward", lambda *args, **how: calls.append(1) or forward(*args, **how))

    def run(x, **options):
        o, S = backend(chunk_kda, **x, output_final_state=True, **options)
        assert calls and o.dtype == backend.dtype and S.dtype == torch.float32
        return o.cpu(), S.cpu()
    return run


def resolved(x, unit=False, gated=False, A_log=None, dt_bias=None, lower_bound=None, raw_beta=False, doubled=False):
    "Inputs of the recurrence, from what the kernels are given."
    x = dict(x)
    if unit: x["q"], x["k"] = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (x["q"], x["k"]))
    if gated:
        z = x["g"] if dt_bias is None else x["g"] + dt_bias.view(x["g"].shape[2:])
        rate = 1 if A_log is None else A_log.exp()[:, None]
        x["g"] = -rate * F.softplus(z, threshold=60) if lower_bound is None else lower_bound * torch.sigmoid(rate * z)
    if raw_beta: x["beta"] = x["beta"].sigmoid() * (2 if doubled else 1)
    return x


def check(fused, backend, x, cu_seqlens=None, tol=5e-6, scale=None, times=1, **options):
    "Outputs and final states; `options` as in `resolved`. `times`: how many errors of the recurrence are allowed in half precision."
    x = {name: t if t is None else backend.rounded(t) for name, t in x.items()}
    options = {name: backend.rounded(t) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    names = dict(unit="use_qk_l2norm_in_kernel", gated="use_gate_in_kernel", raw_beta="use_beta_sigmoid_in_kernel",
                 doubled="allow_neg_eigval")
    got = fused(x, cu_seqlens=cu_seqlens, scale=scale, **{names.get(name, name): t for name, t in options.items()})
    plain, S0 = resolved(x, **options), x["initial_state"]
    N, (HV, V), K = len(x["v"]) if cu_seqlens is None else len(cu_seqlens) - 1, x["v"].shape[2:], x["k"].shape[3]
    plain["initial_state"] = torch.zeros(N, HV, K, V).double() if S0 is None else S0
    want = recurrence(plain, scale=scale) if cu_seqlens is None else recurrence_packed(plain, cu_seqlens, scale=scale)
    limits = tol, tol
    if backend.dtype != torch.float32:
        half = in_half(plain, cu_seqlens, scale, backend.dtype)
        limits = [min(times * distance(a, b) + torch.finfo(backend.dtype).eps, 0.5) for a, b in zip(half, want)]
    for a, b, limit in zip(got, want, limits): assert distance(a, b) <= limit


def in_half(x, cu_seqlens, scale, dtype):
    "The recurrence with every intermediate result in half precision."
    packed = [0, x["v"].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    x = {name: t.to(DEVICE, dtype) for name, t in x.items()}
    scale, outputs, states = x["k"].shape[3] ** -0.5 if scale is None else scale, [], []
    q, k = (x[name].repeat_interleave(x["v"].shape[2] // x[name].shape[2], 2) for name in "qk")
    for n, (start, end) in enumerate(zip(packed, packed[1:])):
        S = x["initial_state"] if cu_seqlens is None else x["initial_state"][n:n + 1]
        for t in range(start, end):
            S = x["g"][:, t].exp()[..., None] * S
            error = x["v"][:, t] - (k[:, t, :, None] @ S)[:, :, 0]
            S = S + (x["beta"][:, t, :, None] * k[:, t])[..., None] * error[..., None, :]
            outputs.append((scale * q[:, t, :, None] @ S)[:, :, 0])
        states.append(S)
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(x["v"])
    return o.cpu(), torch.cat(states).cpu()


def lengths(x, seed=1):
    "Queries and keys between a third and three times as long."
    random = torch.Generator().manual_seed(seed)
    stretch = lambda t: t * 3 ** (2 * torch.rand(*t.shape[:-1], 1, generator=random).double() - 1)
    return dict(x, q=stretch(x["q"]), k=stretch(x["k"]))


# ---- shapes

@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 32, 32), (1, 33, 1, 1, 128, 64), (2, 40, 1, 2, 64, 96), (2, 0, 1, 1, 32, 32),
                                   (2, 35, 1, 2, 96, 32), (1, 33, 1, 1, 256, 64)], ids=str)
def test_shapes(fused, backend, shape):
    B, T, H, HV, K, V = shape
    check(fused, backend, lengths(draw(B, T, H, K, V, HV)), unit=True)


def test_no_initial_state(fused, backend):
    check(fused, backend, dict(draw(1, 40, 1, 32, 32), initial_state=None))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed(fused, backend, integers):
    lens = [0, 1, 33, 0, 20, 0]
    x = draw(1, sum(lens), 1, 32, 32, HV=2, N=len(lens))
    check(fused, backend, lengths(x), borders(lens).to(integers), unit=True)


def cut(monkeypatch):
    "In three stretches, some of no chunk; on a GPU on a second stream, though walks are many."
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 10 ** 6)
    monkeypatch.setattr(kernels, "stretches", lambda stream, count, programs: [(0, count // 3), (count // 3, count // 3), (count // 3, count)])


@pytest.mark.parametrize("packed", [False, True])
def test_in_stretches(fused, backend, monkeypatch, packed):
    cut(monkeypatch)
    borders_ = borders([40, 0, 1, 97, 3]) if packed else None
    check(fused, backend, draw(2 - packed, 141, 1, 32, 32, HV=2, N=5 if packed else 2), borders_)


def test_only_empty_sequences(fused, backend):
    x = draw(1, 0, 1, 32, 32, N=2)
    _, S = fused(x, cu_seqlens=borders([0, 0]))
    assert torch.equal(S, x["initial_state"].to(backend.dtype).float())


def test_layouts(fused, backend):
    "Inputs that are not contiguous, states with values first."
    x = {name: backend.rounded(t) for name, t in draw(2, 40, 2, 32, 32).items()}
    want, want_S = fused(x)
    turned = {name: t if name == "initial_state" else t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.items()}
    o, S = fused(dict(turned, initial_state=x["initial_state"].mT), state_v_first=True)
    assert torch.equal(o, want) and torch.equal(S.mT, want_S)


# ---- decays

STEPS = torch.tensor([0., -0.01, -1., -5., -6., -20., -80., -500.]).double()
DECAYS = {str(d.item()): d for d in STEPS} | {
    "mixed": STEPS[torch.randint(8, (1, 40, 1, 64), generator=torch.Generator().manual_seed(1))],
    "one cut": -500. * (torch.arange(40) == 20).double()[:, None, None], "by channel": STEPS[torch.arange(64) % 8],
    "none is left": torch.tensor(-1e30 if DEVICE == "cpu" else -6e4).double()}


@pytest.mark.parametrize("decay", DECAYS)
def test_hard_decays(fused, backend, decay):
    check(fused, backend, draw(1, 40, 1, 64, 32, decay=DECAYS[decay]))


GATES = {"softplus": dict(lower_bound=None), "no bias": dict(lower_bound=None, dt_bias=None), "bounded": dict(lower_bound=-5.),
         "no rate": dict(lower_bound=-5., A_log=None), "bounded far below": dict(lower_bound=-60.)}


@pytest.mark.parametrize("gate", GATES)
def test_gates(fused, backend, gate):
    x = draw(1, 40, 1, 32, 32, HV=2)
    x["g"], x["beta"] = 8 * torch.randn_like(x["g"]), 3 * torch.randn_like(x["beta"])
    given = dict(A_log=torch.rand(2), dt_bias=torch.randn(64)) | GATES[gate]
    check(fused, backend, lengths(x), unit=True, gated=True, raw_beta=True, **given, tol=1e-5)


# ---- keys, strengths, scales

@pytest.mark.parametrize("options", [dict(raw_beta=True), dict(raw_beta=True, doubled=True, unit=True), dict(raw_beta=True, doubled=True),
                                     dict(gated=True, lower_bound=-5.), dict(gated=True, lower_bound=-60., unit=True), dict(scale=0.3), dict(scale=-2., unit=True)],
                         ids=str)
def test_options(fused, backend, options):
    x = draw(1, 40, 1, 32, 32)
    if "raw_beta" in options: x["beta"] = 3 * torch.randn_like(x["beta"])
    check(fused, backend, lengths(x) if "unit" in options else x, **options)


@pytest.mark.parametrize("strength", [1., 2.])
def test_keys_that_repeat(fused, backend, strength):
    x = draw(1, 64, 1, 64, 32, decay=-0.001)
    x["k"] = F.normalize(torch.ones_like(x["k"]) + 1e-3 * torch.randn_like(x["k"]), dim=-1)
    x["beta"] = torch.full_like(x["beta"], strength)
    check(fused, backend, x, tol=1e-5 * strength, times=1 if strength == 1 else 4)       # nothing fades what is rounded


@pytest.mark.parametrize("unit", [True, False])
def test_strengths_of_zero(fused, backend, unit):
    "What is not written leaves no trace."
    x = draw(1, 40, 1, 32, 32, decay=0.)
    x = {name: backend.rounded(t) for name, t in dict(x, beta=0 * x["beta"]).items()}
    _, S = fused(x, use_qk_l2norm_in_kernel=unit)
    assert torch.equal(S.double(), x["initial_state"])


@pytest.mark.parametrize("length", [1e-2, 1e3])
@pytest.mark.parametrize("gate", ["bounded", "free"])
def test_short_and_long_keys(fused, backend, length, gate):
    "Long ones are written faintly, or the state would explode; decays as strong as one product takes, or nearly."
    if length > 1 and backend.dtype == torch.float16: pytest.skip("it has no exponents for so faint strengths")
    x = draw(1, 40, 1, 32, 32)
    x["k"], x["beta"] = length * x["k"], x["beta"] * min(1, length ** -2)
    if backend.dtype == torch.float16: x["beta"] = x["beta"].clamp(min=1e-7)
    z = torch.full_like(x["g"], 30. if gate == "bounded" else -5.4)
    z[:, 5] = -0.01
    options = dict(gated=True, lower_bound=-5.) if gate == "bounded" else {}
    check(fused, backend, dict(x, g=z), **options, tol=2e-5)


# ---- the choice

def test_who_computes(monkeypatch):
    "The two kernels where nothing needs a gradient and they fit; else everything as before."
    dtype, calls = DTYPES[0], []
    monkeypatch.setattr(kernels, "fused_forward", lambda q, k, v, *rest, keep=False: calls.append(keep) or (v + 0, None, v))
    if DEVICE == "cpu": monkeypatch.setattr(kernels, "fits", lambda q, *rest: q.shape[3] > 20)
    monkeypatch.setattr("kda_lit.chunk.whole_sizes", lambda K, V: K == 32)
    backend = Backend("triton", dtype)
    def used(x, **options):
        calls.clear()
        backend(chunk_kda, **x, **options)
        return calls
    x = draw(1, 5, 1, 32, 32)
    assert used(x) == [False] and not used(x, return_intermediate_states=True) and not used(draw(1, 5, 1, 20, 32))
    raw = dict(use_beta_sigmoid_in_kernel=True)
    assert used(x, use_qk_l2norm_in_kernel=True) == used(x, **raw) == used(x, **raw, allow_neg_eigval=True) == [False]
    leaf = backend.put(x["g"]).requires_grad_()
    assert used(dict(x, g=leaf), **raw) == [True]                        # and states are kept
    assert used(dict(x, g=leaf)) == [True] * (dtype != torch.float16)
    with torch.no_grad(): assert used(dict(x, g=leaf)) == [False]


@pytest.mark.parametrize("dtype, K, V, fit", [(torch.bfloat16, 128, 128, True), (torch.float16, 64, 96, True), (torch.float32, 128, 128, False),
                                              (torch.bfloat16, 96, 128, True), (torch.bfloat16, 256, 256, True), (torch.bfloat16, 64, 60, False),
                                              (torch.bfloat16, 60, 64, False), (torch.bfloat16, 288, 64, False), (torch.bfloat16, 64, 0, False)])
def test_fits(dtype, K, V, fit):
    q, v = torch.empty(1, 1, 1, K, dtype=dtype), torch.empty(1, 1, 1, V, dtype=dtype)
    assert kernels.fits(q, q, v) == fit and not kernels.fits(q, q, v.double())


# ---- on a GPU

@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("bound", [None, -5.])
@pytest.mark.parametrize("shape", [(2, 1000, 4, 8, 128, 128), (1, 3000, 2, 2, 64, 64), (1, 777, 2, 4, 128, 32),
                                   (1, 500, 2, 2, 96, 96), (1, 500, 2, 4, 256, 256)], ids=str)
def test_larger(fused, backend, shape, bound):
    B, T, H, HV, K, V = shape
    x = draw(B, T, H, K, V, HV)
    x["g"], x["beta"] = torch.randn_like(x["g"]), torch.randn_like(x["beta"])
    check(fused, backend, lengths(x), unit=True, gated=True, raw_beta=True, A_log=torch.rand(HV), dt_bias=torch.randn(HV * K), lower_bound=bound)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_many_sequences():
    "More walks than the second axis of a grid may have."
    x = {name: t.to("cuda", torch.bfloat16) for name, t in draw(1, 3000, 32, 32, 32, N=3000).items()}
    o, S = chunk_kda(**x, output_final_state=True, cu_seqlens=torch.arange(3001, device="cuda"))
    want, want_S = naive_recurrent_kda(**{name: (t if name == "initial_state" else t.transpose(0, 1)).float() for name, t in x.items()},
                                       output_final_state=True)
    assert distance(o[0], want[:, 0]) < 0.02 and distance(S, want_S) < 0.02
