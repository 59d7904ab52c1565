"""Half precision: values and gradients at most twice as far from float64 as plain PyTorch in the same precision, and in fact
no further than the rounding of the result."""
import pytest
import torch
import torch.nn.functional as F

import kda_lit as kl
from helpers import cast, distance, draw

SHAPES = [  # B, T, H, HV, K, V
    (1, 1, 1, 1, 16, 16), (2, 20, 2, 4, 24, 40), (1, 64, 3, 3, 60, 32), (1, 70, 1, 2, 32, 17)]
OPERATORS = {"chunk_kda": kl.chunk_kda, "fused_recurrent_kda": kl.fused_recurrent_kda,
             "chunk_gated_delta_rule": kl.chunk_gated_delta_rule,
             "fused_recurrent_gated_delta_rule": kl.fused_recurrent_gated_delta_rule}
HARD = ["no decay", "strong decay", "equal keys, beta 1", "beta 2", "long keys, inside norm"]
operators = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def recurrence(q, k, v, g, beta, initial_state, normalise):
    "KDA as one would write it down, every operation in the precision of its inputs."
    if normalise: q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if g.ndim == 3: g = g[..., None]
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S, outputs = initial_state, []
    for t in range(v.shape[1]):
        S = g[:, t].exp()[..., None] * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, S))
    return torch.stack(outputs, 1), S


def results(f, x, do, dS):
    "Outputs, final states, and the gradients of all inputs, by name."
    x = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    o, S = f(**x)
    grads = torch.autograd.grad((o, S), list(x.values()), (do.to(o.dtype), dS.to(S.dtype)))
    return dict(o=o, S=S) | {"d" + name: d for name, d in zip(x, grads)}


def compare(op, x, dtype, normalise=False):
    "The errors of all results: (ours, plain PyTorch's) by name; and ours must be but a rounding."
    if "gated_delta_rule" in op.__name__: x = dict(x, g=x["g"][..., 0].contiguous())
    x = cast(x, dtype)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    ours = lambda **x: op(**x, output_final_state=True, use_qk_l2norm_in_kernel=normalise)
    plain = lambda **x: recurrence(**x, normalise=normalise)
    want = results(plain, cast(x, torch.float64), do, dS)
    for name, got in results(ours, x, do, dS).items():
        assert got.dtype == (torch.float32 if name == "S" else dtype), name
        info = torch.finfo(got.dtype)
        rounding = info.eps / 2 * want[name].abs().clamp(min=info.smallest_normal)
        assert ((got.double() - want[name]).abs() <= rounding + 1e-5 * want[name].abs().max()).all(), name
        yield name, distance(got, want[name]), distance(results(plain, x, do, dS)[name], want[name])


def bounded(op, x, dtype, **options):
    for name, ours, theirs in compare(op, x, dtype, **options):
        rounding = torch.finfo(dtype).eps / 2
        assert ours <= max(2 * theirs, rounding), f"{name}: {ours:.1e}, plain {theirs:.1e}"


@half
@operators
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, op, dtype):
    B, T, H, HV, K, V = shape
    bounded(op, draw(B, T, H, K, V, HV), dtype)


@half
@operators
@pytest.mark.parametrize("how", HARD)
def test_hard_cases(how, op, dtype):
    x = draw(1, 66, H=2, HV=4, K=24, V=20, decay={"no decay": 0., "strong decay": -20.}.get(how))
    if how == "equal keys, beta 1":
        x["k"] = F.normalize(x["k"][:, :1] + 0.05 * x["k"], dim=-1)
        x["beta"].fill_(1)
    if how == "beta 2": x["beta"] = 2 * x["beta"]
    if how == "long keys, inside norm": x["k"] = 5 * x["k"]
    bounded(op, x, dtype, normalise="norm" in how)
