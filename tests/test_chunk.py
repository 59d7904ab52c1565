"""`chunk_kda` against the recurrence in float64: shapes, dtypes, ragged batches, decays, hard keys, and what must hold anyway."""
import pytest
import torch
import torch.nn.functional as F

from helpers import NAMES, borders, cast, distance, draw, gradients, recurrence, recurrence_packed
from kda_lit import chunk_kda, naive_chunk_kda, naive_recurrent_kda, use_backend

EPS = torch.finfo(torch.float32).eps
SHAPES = [  # B, T, H, HV, K, V: one token, a part of a chunk, a border, a border and one, three chunks
    (1, 1, 1, 1, 16, 16), (2, 7, 2, 4, 60, 100), (1, 17, 3, 3, 100, 60), (3, 63, 1, 1, 8, 12),
    (1, 64, 2, 2, 60, 60), (1, 65, 1, 3, 17, 100), (2, 130, 2, 6, 33, 5)]
EXACT = {torch.float64: 1e-13, torch.float32: 16 * EPS}
HALF = [torch.bfloat16, torch.float16]


def run(x, **options):
    return chunk_kda(**x, output_final_state=True, **options)


def as_drawn(shape, dtype, **options):
    B, T, H, HV, K, V = shape
    return draw(B, T, H, K, V, HV, dtype=dtype, **options)


# ---- values

@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, chunk_size):
    x = as_drawn(shape, dtype)
    o, S = run(x, chunk_size=chunk_size)
    want, want_S = recurrence(x)
    assert o.dtype == S.dtype == dtype
    assert distance(o, want) < EXACT[dtype]
    assert distance(S, want_S) < EXACT[dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
def test_half_precision_loses_only_the_rounding_of_its_output(shape, dtype):
    x = as_drawn(shape, dtype)
    o, S = run(x)
    want, want_S = recurrence(x)
    rounding = torch.finfo(dtype).eps / 2 * want.abs()
    assert o.dtype == dtype and S.dtype == torch.float32
    assert ((o.double() - want).abs() <= rounding + 1e-5 * want.abs().max()).all()
    assert distance(S, want_S) < 16 * EPS


def test_gates_may_be_wider_than_the_rest():
    "The usual case in a model: q, k, v in bfloat16, decays and strengths in float32."
    x = draw(2, 70, dtype=torch.bfloat16)
    x["g"], x["beta"], x["initial_state"] = (x[name].float() for name in ("g", "beta", "initial_state"))
    o, S = run(x)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert distance(o, recurrence(x)[0]) < 2 ** -8


@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("lens", [[0, 1, 63, 0, 64, 65, 130, 0], [7], [0, 0, 5], [1] * 9], ids=str)
def test_ragged(lens, integers, chunk_size):
    cu_seqlens = borders(lens)
    x = draw(1, sum(lens), H=2, HV=4, K=12, V=20, N=len(lens))
    o, S = run(x, cu_seqlens=cu_seqlens.to(integers), chunk_size=chunk_size)
    want, want_S = recurrence_packed(x, cu_seqlens)
    assert distance(o, want) < 1e-13
    assert distance(S, want_S) < 1e-13
    empty = [n for n, length in enumerate(lens) if length == 0]
    assert torch.equal(S[empty], x["initial_state"][empty])


@pytest.mark.parametrize("options", [{}, {"scale": 0.31}, {"scale": -2.0}, {"use_qk_l2norm_in_kernel": True}], ids=str)
def test_options(options):
    x = draw(2, 70)
    x["q"], x["k"] = 3 * x["q"], 0.5 * x["k"]
    o, _ = run(x, **options)
    if options.pop("use_qk_l2norm_in_kernel", False):
        x["q"], x["k"] = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (x["q"], x["k"]))
    assert distance(o, recurrence(x, **options)[0]) < 1e-13


def test_no_initial_state_is_a_state_of_zeros():
    x = draw(2, 70)
    zeros = run(dict(x, initial_state=torch.zeros_like(x["initial_state"])))
    for a, b in zip(zeros, run(dict(x, initial_state=None))): assert torch.equal(a, b)


# ---- hard decays and hard keys: float32 must be as good as the recurrence in float32

STEPS = torch.tensor([0., -1., -20., -80., -500.])


def mixed(*shape):
    "Each token and channel draws its decay from the five, independently."
    return STEPS[torch.randint(5, shape, generator=torch.Generator().manual_seed(1))]


DECAYS = {str(int(d)): d for d in STEPS} | {
    "mixed": mixed(2, 130, 2, 60), "by token": STEPS[torch.arange(130) % 5][:, None, None],
    "by channel": STEPS[torch.arange(60) % 5], "one cut": -500. * (torch.arange(130) == 70)[:, None, None]}


def as_good_as(op, x, factor):
    "chunk_kda's float32 error at most `factor` times that of `op`, plus a few roundings."
    x = cast(x, torch.float32)
    for got, plain, want in zip(run(x), op(**x, output_final_state=True), recurrence(x)):
        assert distance(got, want) <= factor * distance(plain, want) + 8 * EPS


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_decays(decay):
    as_good_as(naive_recurrent_kda, draw(2, 130, K=60, V=100, decay=decay), 4)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_decays_gradients(decay):
    x = draw(2, 130, K=60, V=20, decay=decay)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    want = gradients(naive_recurrent_kda, x, do, dS)
    got = gradients(chunk_kda, cast(x, torch.float32), do.float(), dS.float())
    for name in want: assert distance(got[name], want[name]) < 32 * EPS, name


def near_duplicates(noise, beta):
    x = draw(2, 130, decay=0.)
    x["k"] = F.normalize(x["k"][:, :1] + noise * x["k"], dim=-1)
    x["beta"].fill_(beta)
    return x


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("noise", [0., 1e-3, 0.1])
def test_near_duplicate_keys(noise, beta):
    "beta up to 2 mirrors instead of erasing: in chunks, a dense solver in float32 errs by some 1e-5 too."
    as_good_as(naive_chunk_kda, near_duplicates(noise, beta), 10)


@pytest.mark.parametrize("size, most", [(1.4, 1.0), (2.0, 0.45), (4.0, 0.1), (0.0, 1.0)])
def test_keys_that_are_not_unit_vectors(size, most):
    "As long as beta |k|² stays below 2, the recurrence is stable, and so must its chunks be."
    as_good_as(naive_recurrent_kda, long_keys(size, most), 8)


def long_keys(size, most):
    x = draw(2, 130, decay=-0.1)
    return x | dict(k=size * x["k"], beta=most * x["beta"])


HARD_KEYS = {"equal": near_duplicates(0., 1.), "nearly equal": near_duplicates(1e-3, 1.), "mirrored": near_duplicates(0.1, 2.),
             "beta up to 2": draw(2, 130) | dict(beta=2 * draw(2, 130)["beta"]), "length 1.4": long_keys(1.4, 1.0),
             "length 4": long_keys(4.0, 0.1), "zero": long_keys(0.0, 1.0)}


@pytest.mark.parametrize("x", HARD_KEYS.values(), ids=HARD_KEYS)
def test_hard_keys_gradients(x):
    "In float32 at most ten times as far off as autograd through the naive chunks, and a few roundings."
    x = cast(x, torch.float32)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    want = gradients(naive_recurrent_kda, cast(x, torch.float64), do.double(), dS.double())
    got, plain = (gradients(op, x, do, dS) for op in (chunk_kda, naive_chunk_kda))
    for name in want:
        assert distance(got[name], want[name]) <= 10 * distance(plain[name], want[name]) + 32 * EPS, name
        if name != "g": assert distance(got[name], want[name]) < 1e-3, name


# ---- gradients

@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, chunk_size):
    x = as_drawn(shape, torch.float64)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    got = gradients(chunk_kda, x, do, dS, chunk_size=chunk_size)
    want = gradients(naive_recurrent_kda, x, do, dS)
    for name in want: assert distance(got[name], want[name]) < 1e-12, name


def test_gradients_ragged():
    lens = [3, 0, 65, 1]
    cu_seqlens, x = borders(lens), draw(1, sum(lens), N=len(lens))
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    alone = lambda output_final_state, **x: recurrence_packed(x, cu_seqlens)
    got = gradients(chunk_kda, x, do, dS, cu_seqlens=cu_seqlens)
    want = gradients(alone, x, do, dS)
    for name in want: assert distance(got[name], want[name]) < 1e-12, name


@pytest.mark.parametrize("zeros", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_gradients_of_zeros_are_finite(zeros, dtype):
    x = draw(1, 70, dtype=dtype)
    x[zeros] = torch.zeros_like(x[zeros])
    ones = torch.ones_like(x["v"]), torch.ones_like(x["initial_state"])
    for name, gradient in gradients(chunk_kda, x, *ones, use_qk_l2norm_in_kernel=True).items():
        assert gradient.isfinite().all() and gradient.dtype == dtype, name


# ---- what must hold whatever the numbers

@pytest.mark.parametrize("at", [1, 31, 64, 100])
@pytest.mark.parametrize("changed", NAMES)
def test_causality(changed, at):
    "Bit for bit: a chunk multiplies what lies ahead by exact zeros."
    x = draw(1, 130, dtype=torch.float32)
    y = dict(x, **{changed: x[changed].clone()})
    y[changed][:, at:] = -500 if changed == "g" else 3 * x[changed][:, at:] + 1
    a, b = run(x)[0], run(y)[0]
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


@pytest.mark.parametrize("poisoned", NAMES)
def test_sequences_do_not_see_each_other(poisoned):
    "Not even a NaN crosses a border inside a pack."
    x = draw(1, 100, N=3)
    cu_seqlens, mine = borders([30, 7, 63]), slice(30, 37)
    y = dict(x, **{poisoned: x[poisoned].clone()})
    y[poisoned][:, mine] = float("nan")
    (o, S), (o_y, S_y) = run(x, cu_seqlens=cu_seqlens), run(y, cu_seqlens=cu_seqlens)
    others = [t for t in range(100) if t not in range(30, 37)]
    assert torch.equal(o[:, others], o_y[:, others])
    assert torch.equal(S[[0, 2]], S_y[[0, 2]])


def test_order_of_batch_and_heads_is_free():
    x = draw(3, 70, H=3)
    rows, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    head_at = lambda name: 1 if name == "initial_state" else 2
    y = {name: t[rows].index_select(head_at(name), heads) for name, t in x.items()}
    (o, S), (o_y, S_y) = run(x), run(y)
    assert distance(o_y, o[rows][:, :, heads]) < 1e-14
    assert distance(S_y, S[rows][:, heads]) < 1e-14


def test_value_heads_share_their_query_head():
    x = draw(2, 70, H=2, HV=6)
    repeated = dict(x, q=x["q"].repeat_interleave(3, 2), k=x["k"].repeat_interleave(3, 2))
    for a, b in zip(run(x), run(repeated)): assert torch.equal(a, b)


def strided(t):
    "The same numbers, two apart in memory and with the last two axes swapped."
    return torch.stack([t, t.neg()], -1).transpose(-2, -3).contiguous().transpose(-2, -3)[..., 0]


@pytest.mark.parametrize("packed", [False, True])
def test_strided_inputs(packed):
    options = {"cu_seqlens": borders([30, 40])} if packed else {}
    x = draw(1 if packed else 2, 70, N=2)
    y = {name: strided(t) for name, t in x.items()}
    assert not any(t.is_contiguous() for t in y.values())
    for a, b in zip(run(x, **options), run(y, **options)): assert distance(a, b) < 1e-14


def storage(t): return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 64, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_inputs_stay_as_they_are(T, dtype, packed):
    "Not changed, and no output shares their memory: writing into o or S must not reach them."
    x = draw(1, T, dtype=dtype, N=3 if packed else 1)
    before = {name: t.clone() for name, t in x.items()}
    outputs = run(x, cu_seqlens=borders([0, T, 0]) if packed else None)
    assert all(torch.equal(x[name], before[name]) for name in x)
    assert not {storage(t) for t in outputs if t.numel()} & {storage(t) for t in x.values()}


@pytest.mark.parametrize("op", [chunk_kda, naive_recurrent_kda, naive_chunk_kda])
def test_no_tokens(op):
    x = draw(2, 0, V=24, dtype=torch.float32)
    o, S = op(**x, output_final_state=True)
    assert o.shape == (2, 0, 2, 24) and o.dtype == torch.float32
    assert torch.equal(S, x["initial_state"]) and storage(S) != storage(x["initial_state"])


def test_no_tokens_packed():
    x = draw(1, 0, N=3)
    o, S = run(x, cu_seqlens=borders([0, 0, 0]))
    assert o.shape == x["v"].shape and torch.equal(S, x["initial_state"])


def test_a_final_state_only_when_asked_for():
    x = draw(1, 5)
    assert chunk_kda(**x)[1] is None
    assert naive_recurrent_kda(**x)[1] is None


def test_backend_is_the_callers_choice():
    x = draw(1, 5)
    with use_backend("torch"): assert torch.equal(run(x)[0], run(x)[0])
    with use_backend("triton"), pytest.raises(RuntimeError, match="in Triton"): run(x)
    run(x)                                               # and the choice ends with its block
