"""Short convolution, gated norm and the layers on top: right, and the same in PyTorch and in Triton? Against loops in float64."""
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from helpers import borders, distance
from kda_lit import FusedRMSNormGated, GatedDeltaNet, KimiDeltaAttention, ShortConvolution, kernels, rms_norm_gated, use_backend
from kda_lit.modules import CausalConvFunction, short_conv
from test_equations import ROOM
from test_modules import conv_by_loop

COMPUTE = set("add bmm cat convolution cumsum exp index_add index_copy mean mm mul rsqrt sigmoid silu square sum".split())


class Computed(TorchDispatchMode):
    "What PyTorch itself computes in the `with` block."
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.names |= COMPUTE & {f.overloadpacket.__name__}
        return f(*args, **kwargs or {})


# ---- the convolution

CONVS = {                                                              # rows or lengths of packed sequences; tokens, channels, taps
    "rows": (2, 35, 70, 4), "one token": (3, 1, 64, 4), "two tokens": (2, 2, 60, 4), "a block": (1, 28, 6, 4), "three taps": (1, 30, 6, 3),
    "one tap": (2, 40, 5, 1), "no token": (2, 0, 7, 4), "no row": (0, 9, 7, 4), "no channel": (2, 9, 0, 4),
    "packed": ([3, 0, 61, 1], 65, 66, 4), "packed tokens": ([1, 1, 1], 3, 6, 2), "all empty": ([0, 0], 0, 6, 4), "none": ([], 0, 6, 4),
}


@pytest.mark.parametrize("silu, bias", [(True, False), (False, True)], ids=["silu", "bias"])
@pytest.mark.parametrize("case", CONVS)
def test_short_convolution(every_backend, case, silu, bias):
    "With every gradient, those of the past and of the new cache included."
    rows, T, D, W = CONVS[case]
    lens = rows if isinstance(rows, list) else None
    B, N = (rows, rows) if lens is None else (1, len(lens))
    random = lambda *size: every_backend.rounded(torch.randn(size))
    x, past, weight, b = (random(*size).requires_grad_() for size in ((B, T, D), (N, D, W), (D, 1, W), (D,)))
    sequences = x if lens is None else x[0].split(lens) if lens else ()
    pairs = [conv_by_loop(part, p, weight, b if bias else None, silu) for part, p in zip(sequences, past)]
    leaves = [x, weight, past, b][:3 + bias]
    y, cache = every_backend(CausalConvFunction.apply, x, weight, b if bias else None, past, None if lens is None else borders(lens),
                             silu, every_backend.dtype)
    assert y.shape == x.shape and y.dtype == cache.dtype == every_backend.dtype
    stack = torch.stack if lens is None else lambda ys: torch.cat(ys)[None]
    want = stack([y for y, _ in pairs]) if pairs else x * 1
    want_cache = torch.stack([c for _, c in pairs]) if pairs else past * 1
    assert distance(y.cpu(), want) < 8 * every_backend.eps and torch.equal(cache.cpu().double(), want_cache)
    d = random(*want.shape), random(*want_cache.shape)
    wanted = torch.autograd.grad((want, want_cache), leaves, d, materialize_grads=True)
    for got, exact in zip(torch.autograd.grad((y, cache), leaves, every_backend.put(d)), wanted):
        assert distance(got, exact) < 32 * every_backend.eps


def test_convolution_in_pieces(every_backend):
    "A prefill, four single tokens, an empty piece and the rest; the inputs do not lie one behind the other in memory."
    conv = ShortConvolution(70, bias=True).to(DEVICE, every_backend.dtype)
    x, cache = every_backend.put(torch.randn(2, 70, 90)).mT, None
    whole, end = every_backend(conv, x, output_final_state=True)
    ys = []
    for piece in x.split([33, 1, 1, 1, 1, 0, 53], 1):
        step = piece.shape[1] == 1
        y, cache = every_backend(lambda: conv.step(piece, None, cache, True) if step else conv(piece, None, None, cache, True))
        ys.append(y)
    assert distance(torch.cat(ys, 1), whole) < 8 * every_backend.eps and torch.equal(cache, end)


def test_mask_and_residual(every_backend):
    "Padding is silent; the sum with the residual is rounded once."
    conv, mask = ShortConvolution(6).to(DEVICE, every_backend.dtype), torch.ones(2, 9).to(DEVICE)
    mask[1, :4] = 0
    x, residual = every_backend.put(torch.randn(2, 2, 9, 6))
    y, _ = every_backend(conv, x, residual, mask)
    exact = lambda x, residual: deepcopy(conv).cpu().double()(x.cpu().double(), residual.cpu().double())[0]
    want = torch.stack([exact(x[:1], residual[:1])[0, 4:], exact(x[1:, 4:], residual[1:, 4:])[0]])
    assert y.dtype == every_backend.dtype and distance(y[:, 4:].cpu(), want) <= max(every_backend.eps, 4e-7)


def test_one_token_is_one_launch(monkeypatch):
    "Filter, silu and cache together; PyTorch computes nothing."
    launches, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda kernel, *args, **constants: launches.append((kernel, args, constants)))
    conv = ShortConvolution(64).to(DEVICE)
    x, cache = torch.randn(3, 1, 64, device=DEVICE), torch.randn(3, 64, 4, device=DEVICE)
    with use_backend("triton"), torch.no_grad(), Computed() as computed: y, new = conv.step(x, None, cache, True)
    assert len(launches) == 1 and not computed.names
    kernel, args, constants = launches[0]
    launch(kernel, *args, **constants)
    want, want_new = conv.double()(x.double(), cache=cache.double(), output_final_state=True)
    assert distance(y, want) < 1e-6 and torch.equal(new.double(), want_new)


@pytest.mark.skipif(not ROOM, reason="needs a GPU with 40 GB")
@pytest.mark.parametrize("packed", [False, True])
def test_more_inputs_than_int32_can_count(packed):
    x, weight = torch.randn(2**20 + 40, 2048, device="cuda", dtype=torch.bfloat16), torch.randn(2048, 1, 4, device="cuda")
    lens = [2**20, 40]
    run = lambda x, lens: short_conv(x[None], weight, None, x.new_zeros(len(lens), 2048, 4), borders(lens).cuda() if packed else None, True, x.dtype)[0]
    got = run(x, lens if packed else [len(x)])
    assert torch.equal(got[0, -30:], run(x[-40:], [40])[0, -30:])


# ---- the gated norm

@pytest.mark.parametrize("activation, affine", [("sigmoid", 1), ("swish", 2), ("silu", 0)])
@pytest.mark.parametrize("shape", [(7, 3, 60), (70, 128), (3, 1), (40, 1000), (5,), (0, 5), (300, 100)], ids=str)
def test_gated_norm(every_backend, shape, activation, affine):
    "Faint rows, loud ones, one of zeros; the gradient of x is a difference, of terms as large as r · ∂n."
    random = lambda *size: every_backend.rounded(torch.randn(size))
    x, g, dy, D = random(*shape), 3 * random(*shape), random(*shape), shape[-1]
    x = every_backend.rounded(x * torch.logspace(-2, 2, len(x)).double().view(-1, *[1] * (len(shape) - 1)))
    if len(shape) > 1: x[:1] = 0
    leaves = [t.requires_grad_() for t in (x, every_backend.rounded(g), *(random(D) for _ in range(affine)))]
    weight, bias = (*leaves[2:], None, None)[:2]
    r = (x.square().sum(-1, keepdim=True) / D + 1e-5) ** -0.5
    w, gate = 1 if weight is None else weight, (1 if activation == "sigmoid" else leaves[1]) / (1 + (-leaves[1]).exp())
    want = (x * r * w + (0 if bias is None else bias)) * gate
    y = every_backend(rms_norm_gated, *leaves[:2], weight, bias, activation, eps=1e-5)
    assert y.dtype == every_backend.dtype and distance(y.cpu(), want) < 8 * every_backend.eps
    grads = torch.autograd.grad(y, leaves, every_backend.put(dy))
    (dx, *others), (dx_want, *others_want) = grads, torch.autograd.grad(want, leaves, dy)
    assert ((dx - dx_want).abs() <= 8 * every_backend.eps * r * (dy * gate * w).norm(dim=-1, keepdim=True)).all()
    for got, exact in zip(others, others_want): assert distance(got, exact) < 32 * every_backend.eps


def test_norm_with_a_residual(every_backend):
    norm = FusedRMSNormGated(60, activation="sigmoid").to(DEVICE, every_backend.dtype)
    x, g, residual = every_backend.put(torch.randn(3, 2, 8, 60))
    y, total = every_backend(norm, x, g, residual, prenorm=True)
    want, want_total = (deepcopy(norm).cpu().double()(*(t.cpu().double() for t in (x, g, residual)), prenorm=True))
    assert y.dtype == total.dtype == every_backend.dtype
    assert distance(y.cpu(), want) < 8 * every_backend.eps and distance(total.cpu(), want_total) < every_backend.eps


# ---- the layers

LAYERS = {"kda": lambda: KimiDeltaAttention(24, head_dim=12, num_heads=2, num_v_heads=4, conv_bias=True),
          "bounded": lambda: KimiDeltaAttention(24, head_dim=16, num_heads=2, lower_bound=-5.0),
          "gdn": lambda: GatedDeltaNet(24, head_dim=8, num_heads=2)}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(backend, name):
    "Packed in training, then one token after a prefill, all against float64."
    layer, cu_seqlens = LAYERS[name](), borders([35, 0, 3, 32])
    exact, here = deepcopy(layer).double(), layer.to(DEVICE, backend.dtype)
    x, dy = torch.randn(2, 1, 70, 24)
    results = []
    for run, f in ((lambda f, *args, **kwargs: f(*args, **kwargs), exact), (backend, here)):
        dtype = next(f.parameters()).dtype
        leaf = x.to(DEVICE if f is here else "cpu", dtype).requires_grad_()
        y = run(f, leaf, cu_seqlens=cu_seqlens)[0]
        grads = torch.autograd.grad(y, [leaf, *f.parameters()], dy.to(y))
        with torch.no_grad():
            _, _, cache = run(f.eval(), leaf[:, :5], use_cache=True)
            one, _, _ = run(f, leaf[:, 5:6], past_key_values=cache, use_cache=True)
        results.append([y, one, *grads])
    close = 1e-10 if backend.dtype == torch.float64 else 2e-4
    for got, want in zip(results[1], results[0]): assert distance(got.cpu(), want) < close


def test_layer_filters_and_norms_in_triton(monkeypatch):
    "Three convolutions and one norm, forward and backward, and nothing silently elsewhere."
    names, launch = [], kernels.launch
    def recorded(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)
    monkeypatch.setattr(kernels, "launch", recorded)
    layer, x = LAYERS["bounded"]().to(DEVICE), torch.randn(1, 9, 24, device=DEVICE)
    with use_backend("triton"): y, _, _ = layer(x)
    y.sum().backward()
    counts = [names.count(name) for name in ("conv_kernel", "conv_bwd_kernel", "gated_norm_kernel", "gated_norm_bwd_kernel")]
    assert counts == [3, 3, 1, 1]
