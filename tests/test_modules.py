"""Convolution and gated norm against loops, in every dtype, packed and cut; their gradients against autograd."""
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import borders, distance
from kda_lit import FusedRMSNormGated, ShortConvolution, rms_norm_gated

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def conv_by_loop(x, past, weight, bias, silu=True):
    "One sequence, token by token. x: [T, D], past: [D, W] → y [T, D], the last W inputs [D, W]."
    W, ys = weight.shape[-1], []
    for token in x:
        past = torch.cat([past[:, 1:], token[:, None]], 1)
        z = sum(weight[:, 0, j] * past[:, j] for j in range(W))
        ys.append(z if bias is None else z + bias)
    y = torch.stack(ys) if ys else x
    return y * y.sigmoid() if silu else y, past


def norm_by_loop(x, g, weight, bias, activation, eps=1e-6):
    "Equation 4 of 45_modules for one row at a time."
    rows = []
    for row, gate in zip(x.flatten(0, -2), g.flatten(0, -2)):
        n = row / (row @ row / len(row) + eps) ** 0.5 * weight + bias
        rows.append(n / (1 + (-gate).exp()) * (1 if activation == "sigmoid" else gate))
    return torch.stack(rows).view_as(x)


def module(D=6, W=4, **options):
    return ShortConvolution(D, W, **options).double()


# ---- the convolution

@pytest.mark.parametrize("activation", ["silu", "swish", None])
@pytest.mark.parametrize("bias", [False, True])
@given(lens=WIDTHS, W=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_packed_convolution_with_pasts(activation, bias, lens, W, seed):
    "Every sequence starts from a past of its own and comes out, gradients included, as a loop makes it."
    torch.manual_seed(seed)
    conv, N = module(W=W, bias=bias, activation=activation), len(lens)
    x, past = torch.randn(1, sum(lens), 6).double().requires_grad_(), torch.randn(N, 6, W).double().requires_grad_()
    y, cache = conv(x, cache=past, output_final_state=True, cu_seqlens=borders(lens))
    pairs = [conv_by_loop(part[0], p, conv.weight, conv.bias, activation is not None)
             for part, p in zip(x.split(lens, 1), past)]
    want, want_cache = torch.cat([y for y, _ in pairs])[None], torch.stack([c for _, c in pairs])
    assert distance(y, want) < 1e-14
    assert torch.equal(cache, want_cache)
    leaves, d = [x, past, *conv.parameters()], [torch.randn_like(y), torch.randn_like(cache)]
    wanted = torch.autograd.grad((want, want_cache), leaves, d, materialize_grads=True)      # no token: none used
    for a, b in zip(torch.autograd.grad((y, cache), leaves, d), wanted):
        assert distance(a, b) < 1e-13


@given(lens=st.lists(WIDTHS, min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_convolution_in_pieces(lens, seed):
    "Any cuts of any ragged batch, in float32."
    torch.manual_seed(seed)
    conv, rounds = ShortConvolution(6, bias=True), max(map(len, lens))
    lens = [widths + [0] * (rounds - len(widths)) for widths in lens]
    sequences = [torch.randn(1, sum(widths), 6) for widths in lens]
    pieces, cache = [[] for _ in lens], None
    for r in range(rounds):
        parts = [x[:, sum(widths[:r]):sum(widths[:r + 1])] for x, widths in zip(sequences, lens)]
        sizes = [p.shape[1] for p in parts]
        y, cache = conv(torch.cat(parts, 1), cache=cache, output_final_state=True, cu_seqlens=borders(sizes))
        for old, new in zip(pieces, y.split(sizes, 1)): old.append(new)
    for x, ys in zip(sequences, pieces): assert distance(torch.cat(ys, 1), conv(x)[0]) < 1e-6


def test_step_is_one_token_of_forward():
    conv = module(bias=True)
    x, cache, residual = (torch.randn(3, *size).double() for size in ((1, 6), (6, 4), (1, 6)))
    y, new = conv.step(x, residual, cache, True)
    want, want_new = zip(*(conv_by_loop(a, c, conv.weight, conv.bias) for a, c in zip(x, cache)))
    assert distance(y, torch.stack(want) + residual) < 1e-14 and torch.equal(new, torch.stack(want_new))
    packed, new = conv.step(x.mT.reshape(3, 6)[None], residual.mT.reshape(3, 6)[None], cache, True, borders([1, 1, 1]))
    assert distance(packed[0], y[:, 0]) < 1e-14 and torch.equal(new, torch.stack(want_new))
    assert conv.step(x)[1] is None and distance(conv.step(x)[0], conv(x)[0]) == 0


@pytest.mark.parametrize("T", [1, 7])
def test_mask_and_residual(T):
    "A masked input is a zero; the residual comes after the silu."
    conv, mask = module(), torch.randint(0, 2, (2, T))
    x, residual = torch.randn(2, 2, T, 6).double().requires_grad_()
    y, cache = conv(x, residual, mask, output_final_state=True)
    want, want_cache = conv(x * mask[..., None], output_final_state=True)
    assert distance(y, want + residual) < 1e-14 and torch.equal(cache, want_cache)
    assert torch.equal(conv(x, residual, mask.bool())[0], y)
    dx, dresidual = torch.autograd.grad(y.sum(), (x, residual))
    assert (dx[mask == 0] == 0).all() and (dresidual == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["rows", "packed", "one token"])
def test_convolution_in_every_dtype(dtype, how):
    "Within what rounding the exact result, and nothing else, would cost."
    T, lens = (1, None) if how == "one token" else (40, [0, 13, 27] if how == "packed" else None)
    N, cu_seqlens = (1, None) if lens is None else (3, borders(lens))
    conv = ShortConvolution(6, bias=True).to(dtype)
    x, past, dy = torch.randn(1, T, 6), torch.randn(N, 6, 4), torch.randn(1, T, 6)

    def run(conv, dtype):
        leaves = [t.detach().to(conv.weight.dtype).requires_grad_() for t in (x.to(dtype), past.to(dtype))]
        y, cache = conv(leaves[0], None, None, leaves[1], True, cu_seqlens)
        assert y.dtype == cache.dtype == conv.weight.dtype
        loss = (y * dy.to(dtype).to(y.dtype)).sum()
        return [y, *torch.autograd.grad(loss, [*leaves, *conv.parameters()])]

    got = run(conv, dtype)
    floor = 1e-15 if dtype == torch.float64 else 2e-7
    for a, exact in zip(got, run(deepcopy(conv).double(), dtype)):
        assert a.dtype == dtype
        assert distance(a, exact) <= 2 * max(distance(exact.to(dtype), exact), floor)


def test_convolution_of_strided_inputs_changes_none():
    conv = module()
    x, cache = torch.randn(6, 12, 2).double().permute(2, 1, 0)[:, ::2], torch.randn(2, 4, 6).double().mT
    before = x.clone(), cache.clone()
    y, new = conv(x, cache=cache, output_final_state=True)
    want, want_new = conv(x.contiguous(), cache=cache.contiguous(), output_final_state=True)
    assert torch.equal(y, want) and torch.equal(new, want_new)
    assert torch.equal(x, before[0]) and torch.equal(cache, before[1])
    new.zero_(), y.data.zero_()
    assert torch.equal(x, before[0]) and torch.equal(cache, before[1])


# ---- the gated norm

@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), D=st.integers(1, 9), loud=st.sampled_from([1e-4, 1., 1e4]))
@settings(max_examples=8)
def test_norm_and_its_gradients(activation, shape, D, loud):
    x, g = torch.randn(2, *shape, D).double()
    x = x * loud
    leaves = [t.requires_grad_() for t in (x, g, torch.rand(D).double(), torch.randn(D).double())]
    y, want = rms_norm_gated(*leaves, activation), norm_by_loop(*leaves, activation)
    assert distance(y, want) < 1e-13
    d = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, d), torch.autograd.grad(want, leaves, d)):
        assert (a - b).norm() <= 1e-12 * (b.norm() + d.norm() / loud)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_norm_in_every_dtype(dtype, activation):
    x, g, residual, dy = torch.randn(4, 5, 3, 8).to(dtype)
    norm = FusedRMSNormGated(8, activation=activation).to(dtype)
    torch.nn.init.uniform_(norm.weight)

    def run(to):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, g, residual, norm.weight)]
        y, total = rms_norm_gated(*leaves[:2], leaves[3], None, activation, leaves[2], True, eps=norm.eps)
        assert y.dtype == total.dtype == to
        return [y, total, *torch.autograd.grad((y * dy.to(to)).sum() + total.sum(), leaves)]

    floor = 1e-15 if dtype == torch.float64 else 1e-7
    for a, exact in zip(run(dtype), run(torch.float64)):
        assert a.dtype == dtype
        assert distance(a, exact) <= 3 * max(distance(exact.to(dtype), exact), floor)
    assert torch.equal(norm(x, g, residual), rms_norm_gated(x, g, norm.weight, None, activation, residual, eps=norm.eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_in_fp32(dtype):
    norm, (x, g, residual) = FusedRMSNormGated(8).to(dtype), torch.randn(3, 5, 8).to(dtype)
    y, total = norm(x, g, residual, prenorm=True, residual_in_fp32=True)
    assert y.dtype == dtype and total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual.float())
    y, total = norm(x, g, prenorm=True, residual_in_fp32=True)
    assert torch.equal(total, x.float())
    wide = residual.float()
    y, total = norm(x, g, wide, prenorm=True)
    assert y.dtype == dtype and total.dtype == torch.float32


def test_norm_without_rows_or_weight():
    bare = FusedRMSNormGated(8, elementwise_affine=False)
    assert bare.weight is None and not list(bare.parameters())
    x, g = torch.randn(2, 5, 8)
    assert distance(bare(x, g), norm_by_loop(x, g, 1, 0, "swish", 1e-5)) < 1e-6
    assert bare(x[:0], g[:0]).shape == (0, 8)
    row, gate = (t[0].clone().requires_grad_() for t in (x, g))
    assert distance(bare(row, gate), bare(x, g)[0]) < 1e-6
    torch.autograd.grad(bare(row, gate).sum(), (row, gate))


def test_statistics_do_not_overflow_in_float16():
    x = torch.full((1, 8), 6e4).half().requires_grad_()
    y = rms_norm_gated(x, torch.full_like(x, 20), None, activation="sigmoid")
    assert distance(y, torch.ones(1, 8)) < 1e-3
    assert torch.autograd.grad(y[0, 0], x)[0].isfinite().all()


def test_autocast_leaves_the_sums_in_float32():
    "Autocast may hand in half precision; it must not compute in it."
    conv, norm, x = ShortConvolution(6), FusedRMSNormGated(6), torch.randn(2, 9, 6)
    for f in (lambda: conv(x)[0], lambda: norm(x, x)):
        want = f()
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(f(), want)
