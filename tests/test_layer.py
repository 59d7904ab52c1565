"""Both layers and their cache: names and sizes, weight decay, dtypes, beams, copies; weights of the released models."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from helpers import distance
from kda_lit import GatedDeltaNet, KDACache, KimiDeltaAttention, l2norm, load_kimi_linear_kda, naive_recurrent_kda

SMALL = dict(hidden_size=24, head_dim=8, num_heads=2)
BOTH = pytest.mark.parametrize("layer", [KimiDeltaAttention, GatedDeltaNet])


def shapes(layer): return {name: list(x.shape) for name, x in layer.state_dict().items()}


def test_names_of_gated_deltanet():
    "The reference library's, so that its checkpoints load."
    qkv = {f"{x}_proj.weight": [n, 24] for x, n in zip("qkv", (16, 16, 64))}
    conv = {f"{x}_conv1d.weight": [n, 1, 4] for x, n in zip("qkv", (16, 16, 64))}
    bias = {f"{x}_conv1d.bias": [n] for x, n in zip("qkv", (16, 16, 64))}
    rest = {"a_proj.weight": [4, 24], "b_proj.weight": [4, 24], "A_log": [4], "dt_bias": [4], "o_norm.weight": [16],
            "o_proj.weight": [24, 64]}
    make = lambda **options: shapes(GatedDeltaNet(**SMALL, num_v_heads=4, **options))
    assert make() == qkv | conv | rest | {"g_proj.weight": [64, 24]}
    assert make(conv_bias=True, use_gate=False) == qkv | conv | bias | rest
    assert make(use_short_conv=False) == qkv | rest | {"g_proj.weight": [64, 24]}


@BOTH
def test_decay_is_spared_by_weight_decay(layer):
    "Also after a checkpoint has been assigned."
    one = layer(**SMALL)
    one.load_state_dict({name: x.clone() for name, x in one.state_dict().items()}, assign=True)
    marked = {name for name, p in one.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias"}


@BOTH
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
@pytest.mark.parametrize("T", [1, 40, 130])
def test_dtypes(layer, dtype, tol, T):
    "Output in the dtype of the input, the state in float32 or wider; near the exact result."
    one = layer(**SMALL).to(dtype).eval()
    x = torch.randn(2, T, 24).to(dtype)
    y, _, cache = one(x, use_cache=True)
    want, _, exact = deepcopy(one).double()(x.double(), use_cache=True)
    assert y.dtype == dtype and cache[0]["recurrent_state"].dtype == (dtype if tol < 1e-9 else torch.float32)
    assert distance(y, want) < tol
    assert distance(cache[0]["recurrent_state"], exact[0]["recurrent_state"]) < tol


@BOTH
def test_no_token_at_all(layer):
    one = layer(**SMALL).eval()
    y, _, cache = one(torch.randn(2, 0, 24), use_cache=True)
    assert y.shape == (2, 0, 24) and cache.get_seq_length() == 0
    y = one(torch.randn(2, 5, 24), torch.zeros(2, 5))[0]
    assert y.shape == (2, 5, 24) and not y.any()


@BOTH
def test_reading_a_cache_without_writing_it(layer):
    one, x = layer(**SMALL).eval(), torch.randn(2, 9, 24)
    cache = one(x[:, :5], use_cache=True)[2]
    y, _, same = one(x[:, 5:], past_key_values=cache)
    assert same is cache and cache.get_seq_length() == 5
    assert distance(y, one(x)[0][:, 5:]) < 1e-5


@BOTH
def test_layers_share_a_cache_by_their_places(layer):
    first, second = (layer(**SMALL, layer_idx=i).eval() for i in (0, 1))
    x, cache = torch.randn(2, 9, 24), KDACache()
    run = lambda part, cache: second(first(part, None, cache, True)[0], None, cache, True)[0]
    y = torch.cat([run(part, cache) for part in x.split([4, 1, 4], 1)], 1)
    assert distance(y, second(first(x)[0])[0]) < 1e-5
    assert [held["tokens"] for held in cache] == [9, 9] and len(cache) == 2


@BOTH
def test_beams(layer):
    "A row goes on from what another row has read."
    one, x, order = layer(**SMALL).eval(), torch.randn(3, 9, 24), torch.tensor([2, 2, 0])
    cache = one(x[:, :6], use_cache=True)[2]
    before = cache.copy()
    cache.reorder_cache(order)
    y = one(x[order, 6:], past_key_values=cache)[0]
    assert distance(y, one(x)[0][order, 6:]) < 1e-5
    assert distance(one(x[:, 6:], past_key_values=before)[0], one(x)[0][:, 6:]) < 1e-5


@BOTH
def test_copies_of_a_cache_go_their_own_ways(layer):
    one, (start, left, right) = layer(**SMALL).eval(), torch.randn(3, 2, 4, 24)
    cache = one(start, use_cache=True)[2]
    other = cache.copy()
    for part, held in ((left, cache), (right, other)):
        y = one(part, past_key_values=held, use_cache=True)[0]
        assert distance(y, one(torch.cat([start, part], 1))[0][:, 4:]) < 1e-5
    assert cache.get_seq_length() == other.get_seq_length() == 8


def test_cache_cannot_be_cut_back():
    cache = KDACache()
    cache.crop(0)                                                   # nothing seen, nothing to drop
    cache.update(torch.ones(1, 2, 8, 8), None, 1, 7)
    cache.crop(7), cache.crop(100)
    with pytest.raises(ValueError, match="cannot give back its last tokens"): cache.crop(6)
    assert cache.get_seq_length(1) == 7 and cache.get_seq_length(0) == 0


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch(layer, side):
    "Those of the rows alone; none at the padding, whatever stands there."
    one, mask = layer(**SMALL).double().train(), torch.ones(3, 70)
    mask[0, 40:], mask[2, 1:] = 0, 0
    if side == "left": mask = mask.flip(1)
    x, dy = torch.randn(2, 3, 70, 24).double()
    x[mask == 0] = 1e3
    x.requires_grad_()
    leaves = [x, *one.parameters()]
    got = torch.autograd.grad(one(x, mask)[0], leaves, dy)
    alone = sum((one(row[None, m.bool()])[0][0] * d[m.bool()]).sum() for row, m, d in zip(x, mask, dy))
    for a, b in zip(got, torch.autograd.grad(alone, leaves)): assert distance(a, b) < 1e-11
    assert not got[0][mask == 0].any()


@BOTH
def test_gradients_through_a_cache(layer):
    "Back through the state and the convolution's inputs, as in one go."
    one, x = layer(**SMALL).double().train(), torch.randn(2, 80, 24).double().requires_grad_()
    first, _, cache = one(x[:, :67], use_cache=True)
    y = torch.cat([first, one(x[:, 67:], past_key_values=cache)[0]], 1)
    leaves, dy = [x, *one.parameters()], torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(one(x)[0], leaves, dy)):
        assert distance(a, b) < 1e-11


@BOTH
def test_modes_agree_in_training(layer):
    chunked = layer(**SMALL).train()
    by_token, x = deepcopy(chunked), torch.randn(2, 70, 24)
    by_token.mode = "fused_recurrent"
    grads = lambda one: torch.autograd.grad(one(x)[0].square().sum(), list(one.parameters()))
    for a, b in zip(grads(chunked), grads(by_token)): assert distance(a, b) < 1e-4


# ---- the released Kimi Linear models

def stored(d=24, H=2, K=8, W=4):
    "One KDA layer under their names."
    n, sizes = H * K, dict(b_proj=(H, d), o_norm=(K,), o_proj=(d, H * K))
    for x in "qkv": sizes |= {f"{x}_proj": (n, d), f"{x}_conv1d": (n, 1, W)}
    for x in "fg": sizes |= {f"{x}_a_proj": (K, d), f"{x}_b_proj": (n, K)}
    return {f"{name}.weight": torch.randn(size) / size[-1] ** 0.5 for name, size in sizes.items()} | {
        "A_log": torch.rand(1, 1, H, 1), "dt_bias": torch.randn(n) - 3}


def answer(w, x, H=2):
    "Eq. 10 of the report from the stored tensors, token by token. x: [B, T, d]"
    heads, linear = lambda z: z.unflatten(-1, (H, -1)), lambda name, z: F.linear(z, w[f"{name}.weight"])
    def conv(name, z):
        taps = w[f"{name}.weight"]
        return heads(F.silu(F.conv1d(F.pad(z.mT, (taps.shape[-1] - 1, 0)), taps, groups=len(taps)).mT))
    q, k, v = (conv(f"{n}_conv1d", linear(f"{n}_proj", x)) for n in "qkv")
    g = -w["A_log"].exp() * heads(F.softplus(linear("f_b_proj", linear("f_a_proj", x)) + w["dt_bias"]))
    o, _ = naive_recurrent_kda(l2norm(q), l2norm(k), v, g, linear("b_proj", x).sigmoid())
    gate = linear("g_b_proj", linear("g_a_proj", x)) + w.get("g_b_proj.bias", 0)
    return linear("o_proj", (F.rms_norm(o, o.shape[-1:], w["o_norm.weight"], 1e-5) * heads(gate).sigmoid()).flatten(-2))


@pytest.mark.parametrize("prefix", ["", "model.layers.7.self_attn."])
@pytest.mark.parametrize("extra", [{}, {"g_b_proj.bias": torch.linspace(-1, 1, 16)}], ids=["as released", "with a bias"])
def test_released_weights(prefix, extra):
    w, x = stored() | extra, torch.randn(2, 70, 24)
    everything = {prefix + name: t for name, t in w.items()} | ({"model.norm.weight": torch.ones(24)} if prefix else {})
    layer = KimiDeltaAttention(**SMALL).requires_grad_()
    torch.nn.init.normal_(layer.g_proj[1].bias)                     # must not survive
    assert load_kimi_linear_kda(everything, layer, prefix=prefix) is layer
    assert distance(layer(x)[0], answer(w, x)) < 1e-5
    assert all(p.requires_grad for p in layer.parameters()) and layer.A_log._no_weight_decay
    w["A_log"].zero_()                                              # the layer has copies
    assert layer.A_log.any()


def test_released_weights_keep_the_dtype_of_the_layer():
    w = {name: t.bfloat16() for name, t in stored().items()} | {"A_log": torch.rand(2)}
    layer = load_kimi_linear_kda(w, KimiDeltaAttention(**SMALL))
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert torch.equal(layer.q_proj.weight, w["q_proj.weight"].float()) and torch.equal(layer.A_log, w["A_log"])
