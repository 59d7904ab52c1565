"""A wrong call must raise before anything runs, and say which argument was wrong, what it must be and what it was."""
from copy import deepcopy

import pytest
import torch
from torch import ones, tensor

import kda_lit as kl
from helpers import NAMES, draw
from test_import import PUBLIC

X = draw(2, 7, H=2, HV=4, K=8, V=6, dtype=torch.float32)            # a right call, in a batch …
P = draw(1, 7, H=2, HV=4, K=8, V=6, N=2, dtype=torch.float32)       # … and packed
A = torch.zeros(2, 7, 4, 64)
H_STATES = torch.zeros(2, 1, 4, 8, 6)
LAYER = dict(hidden_size=24, head_dim=8, num_heads=2)
MODEL = dict(hidden_size=24, head_dim=8, num_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=40)


def ints(t): return t.to(torch.int64)


# ---- every operator checks alike

OPERATOR = {  # what is wrong: the changed arguments, the error, words of its message
    "k of 3 heads": (dict(k=ones(2, 7, 3, 8)), ValueError, "`k`", "[2, 7, 2, 8]", "[2, 7, 3, 8]"),
    "v too short": (dict(v=X["v"][:, :6]), ValueError, "`v`", "[2, 7, 4, 6]", "[2, 6, 4, 6]"),
    "one decay a head": (dict(g=X["g"][..., 0]), ValueError, "`g`", "[2, 7, 4, 8]", "[2, 7, 4]"),
    "decays for H heads": (dict(g=X["g"][:, :, :2]), ValueError, "`g`", "[2, 7, 4, 8]", "[2, 7, 2, 8]"),
    "beta a channel": (dict(beta=X["g"]), ValueError, "`beta`", "[2, 7, 4]", "[2, 7, 4, 8]"),
    "3 value heads on 2": (dict(v=ones(2, 7, 3, 6), g=ones(2, 7, 3, 8), beta=ones(2, 7, 3)),
                           ValueError, "`v`", "multiple of H = 2", "got 3"),
    "V x K state": (dict(initial_state=X["initial_state"].mT), ValueError, "`initial_state`", "[2, 4, 8, 6]", "[2, 4, 6, 8]"),
    "a state too few": (dict(initial_state=X["initial_state"][:1]), ValueError, "`initial_state`", "[2, 4, 8, 6]",
                        "[1, 4, 8, 6]"),
    "integer queries": (dict(q=ints(X["q"])), TypeError, "`q`", "float32", "int64"),
    "complex values": (dict(v=X["v"].to(torch.complex64)), TypeError, "`v`", "float32", "complex64"),
    "integer state": (dict(initial_state=ints(X["initial_state"])), TypeError, "`initial_state`", "float32", "int64"),
    "a list for beta": (dict(beta=[0.5]), TypeError, "`beta`", "a tensor", "list"),
    "another device": (dict(k=X["k"].to("meta")), ValueError, "`k`", "cpu", "meta"),
    **{f"no {name}": (dict([(name, None)]), TypeError, f"`{name}`", "a tensor", "None") for name in NAMES},
}

OPTIONS = {  # of chunk_kda and fused_recurrent_kda
    "batch of 2 packed": (dict(cu_seqlens=tensor([0, 7])), ValueError, "`q`", "batch size 1", "got 2"),
    "rate without gate": (dict(A_log=ones(4)), ValueError, "`A_log`", "use_gate_in_kernel=True", "Tensor"),
    "bias without gate": (dict(dt_bias=ones(32)), ValueError, "`dt_bias`", "use_gate_in_kernel=True", "Tensor"),
    "bound without gate": (dict(lower_bound=-5.), ValueError, "`lower_bound`", "use_gate_in_kernel=True", "float"),
    "gate without rate": (dict(use_gate_in_kernel=True), ValueError, "`A`", "lower_bound", "None"),
    "rate of 3 heads": (dict(use_gate_in_kernel=True, A_log=ones(3)), ValueError, "`A`", "[4]", "[3]"),
    "safe without bound": (dict(use_gate_in_kernel=True, A_log=ones(4), safe_gate=True), ValueError, "`lower_bound`",
                           "safe_gate=True", "None"),
    "strengths up to 2, not raw": (dict(allow_neg_eigval=True), ValueError, "`allow_neg_eigval`",
                                   "use_beta_sigmoid_in_kernel=True", "True"),
    "K x V state": (dict(state_v_first=True), ValueError, "`initial_state`", "[2, 4, 8, 6]", "[2, 4, 6, 8]"),
}

PACKED = {
    "starts at 1": (tensor([1, 3, 7]), ValueError, "0 at its start", "got 1"),
    "falls": (tensor([0, 5, 3, 7]), ValueError, "non-decreasing", "[0, 5, 3, 7]"),
    "ends too early": (tensor([0, 3, 6]), ValueError, "T = 7", "got 6"),
    "ends too late": (tensor([0, 3, 8]), ValueError, "T = 7", "got 8"),
    "floats": (tensor([0., 3., 7.]), TypeError, "int32 or int64", "float32"),
    "a list": ([0, 3, 7], TypeError, "tensor", "list"),
    "a matrix": (tensor([[0, 3, 7]]), ValueError, "[N+1]", "[1, 3]"),
    "empty": (torch.zeros(0, dtype=torch.int64), ValueError, "[N+1]", "[0]"),
}


def refuses(call, error, *words):
    with pytest.raises(error) as caught: call()
    assert type(caught.value) is error
    for word in words: assert word in str(caught.value)


@pytest.mark.parametrize("op", [kl.chunk_kda, kl.fused_recurrent_kda, kl.naive_recurrent_kda, kl.naive_chunk_kda])
@pytest.mark.parametrize("wrong", OPERATOR)
def test_operators(op, wrong):
    change, *what = OPERATOR[wrong]
    refuses(lambda: op(**{**X, **change}), *what)


@pytest.mark.parametrize("op", [kl.chunk_kda, kl.fused_recurrent_kda])
@pytest.mark.parametrize("wrong", OPTIONS)
def test_options(op, wrong):
    change, *what = OPTIONS[wrong]
    refuses(lambda: op(**{**X, **change}), *what)


@pytest.mark.parametrize("op", [
    lambda cu: kl.chunk_kda(**P, cu_seqlens=cu),
    lambda cu: kl.chunk_local_cumsum(P["g"], 64, cu_seqlens=cu),
    lambda cu: kl.chunk_global_cumsum(P["g"], cu_seqlens=cu),
    lambda cu: kl.solve_tril(A[:1], cu),
    lambda cu: kl.chunk_kda_fwd_intra(P["q"], P["k"], P["g"], P["beta"], 1., cu),
    lambda cu: kl.recompute_w_u_fwd(P["k"], P["v"], P["beta"], A[:1], cu_seqlens=cu),
    lambda cu: kl.chunk_gated_delta_rule_fwd_h(P["g"], P["g"], P["v"], cu_seqlens=cu),
    lambda cu: kl.chunk_gla_fwd_o_gk(P["q"], P["v"], P["g"], A[:1], H_STATES[:1], 1., cu),
    lambda cu: kl.ShortConvolution(8)(ones(1, 7, 8), cu_seqlens=cu),
    lambda cu: kl.KimiDeltaAttention(**LAYER)(ones(1, 7, 24), cu_seqlens=cu),
    lambda cu: kl.GatedDeltaNet(**LAYER)(ones(1, 7, 24), cu_seqlens=cu),
], ids="kda local_cumsum global_cumsum solve intra wy states output conv layer gdn".split())
@pytest.mark.parametrize("wrong", PACKED)
def test_borders(op, wrong):
    cu_seqlens, error, *words = PACKED[wrong]
    refuses(lambda: op(cu_seqlens), error, "`cu_seqlens`", *words)


# ---- everything else: a call each

def layer(x=ones(2, 5, 24), **arguments): return kl.KimiDeltaAttention(**LAYER)(x, **arguments)
def gdn(x=ones(2, 5, 24), **arguments): return kl.GatedDeltaNet(**LAYER)(x, **arguments)
def conv(x=ones(1, 7, 8), **arguments): return kl.ShortConvolution(8)(x, **arguments)
def make_layer(**options): return kl.KimiDeltaAttention(**LAYER | options)
def model(ids=ones(2, 5).long(), **arguments): return make_model()(ids, **arguments)
def make_model(**options): return kl.KDAForCausalLM(kl.KDAConfig(**MODEL | options))
def gate(width=16, A=ones(2), K=8, **options): return kl.fused_kda_gate(ones(3, width), A, K, **options)
def padded(width): return ones(2, width, 3), tensor([0, 5, 7])


CALLS = {  # what is wrong: the call, the error, words of its message
    # utils
    "backend": (lambda: kl.use_backend("cuda").__enter__(), ValueError, "`name`", "'torch', 'triton' or None", "'cuda'"),
    "mask of attention scores": (lambda: kl.get_unpad_data(ones(2, 5, 5)), ValueError, "`attention_mask`", "[B, T]",
                                 "[2, 5, 5]"),
    "mask of 2s": (lambda: kl.get_unpad_data(2 * ones(2, 5)), ValueError, "`attention_mask`", "0 and 1", "[2.0]"),
    "mask as a list": (lambda: kl.get_unpad_data([[1, 1]]), TypeError, "`attention_mask`", "a tensor", "list"),
    "q_len": (lambda: kl.unpad_input(ones(2, 3, 4), (), ones(2, 5), 4), ValueError, "`q`", "q_len = 4", "got 3"),
    "states too short": (lambda: kl.unpad_input(ones(2, 5, 4), (ones(2, 4, 4),), ones(2, 5), 5),
                         ValueError, "`states`", "5", "4"),
    "unpadding by a 3-D mask": (lambda: kl.unpad_input(ones(2, 5, 4), (), ones(2, 5, 5), 5), ValueError, "`attention_mask`",
                                "[B, T]", "[2, 5, 5]"),
    "padding side": (lambda: kl.pack_sequence(*padded(5), "up"), ValueError, "`padding_side`", "'left' or 'right'", "'up'"),
    "rows too short": (lambda: kl.pack_sequence(*padded(3)), ValueError, "`x`", "5", "3"),
    "width too small": (lambda: kl.unpack_sequence(ones(1, 7, 3), tensor([0, 5, 7]), desired_shape=(2, 3, 3)),
                        ValueError, "`desired_shape`", "5", "3"),
    "borders of fewer tokens": (lambda: kl.unpack_sequence(ones(1, 7, 3), tensor([0, 5])), ValueError, "`cu_seqlens`",
                                "T = 7", "got 5"),
    # cumulative sums, solve, norm
    "sum of a matrix": (lambda: kl.chunk_local_cumsum(ones(7, 2), 64), ValueError, "`g`", "[B, T, H]", "[7, 2]"),
    "scalar sum of vectors": (lambda: kl.chunk_local_cumsum_scalar(X["g"], 64), ValueError, "`g`", "[B, T, H]", "[2, 7, 4, 8]"),
    "vector sum of scalars": (lambda: kl.chunk_local_cumsum_vector(X["beta"], 64), ValueError, "`g`", "[B, T, H, S]",
                              "[2, 7, 4]"),
    "sum of integers": (lambda: kl.chunk_local_cumsum(ints(X["g"]), 64), TypeError, "`g`", "float32", "int64"),
    "chunks of 0": (lambda: kl.chunk_local_cumsum(X["g"], 0), ValueError, "`chunk_size`", "got 0"),
    "global sum of a vector": (lambda: kl.chunk_global_cumsum(ones(7)), ValueError, "[B, T, H]", "[7]"),
    "48 columns": (lambda: kl.solve_tril(ones(1, 7, 2, 48)), ValueError, "`A`", "16, 32 or 64", "48"),
    "A without heads": (lambda: kl.solve_tril(ones(1, 7, 16)), ValueError, "`A`", "[B, T, H, C]", "[1, 7, 16]"),
    "norm of integers": (lambda: kl.l2norm(ints(X["q"])), TypeError, "`x`", "float32", "int64"),
    # gate
    "channels not heads x K": (lambda: gate(17), ValueError, "`g`", "K = 8", "17"),
    "rate of 3 heads": (lambda: gate(A=ones(3)), ValueError, "`A`", "[2]", "[3]"),
    "rate as a list": (lambda: gate(A=[1., 2.]), TypeError, "`A`", "a tensor", "list"),
    "no rate": (lambda: gate(A=None), ValueError, "`A`", "`lower_bound`", "None"),
    "bias too short": (lambda: gate(g_bias=ones(8)), ValueError, "`g_bias`", "[16]", "[8]"),
    "bound above 0": (lambda: gate(lower_bound=5.), ValueError, "`lower_bound`", "below 0", "5.0"),
    "integer gates": (lambda: kl.fused_kda_gate(ints(ones(3, 16)), ones(2), 8), TypeError, "`g`", "float32", "int64"),
    # pieces
    "intra chunks of 48": (lambda: kl.chunk_kda_fwd_intra(X["q"], X["k"], X["g"], X["beta"], 1., chunk_size=48),
                           ValueError, "`chunk_size`", "16, 32 or 64", "48"),
    "intra G of 3 heads": (lambda: kl.chunk_kda_fwd_intra(X["q"], X["k"], X["g"][:, :, :3], X["beta"][..., :3], 1.),
                           ValueError, "`gk`", "multiple of H = 2", "3"),
    "wy values of 3 heads": (lambda: kl.recompute_w_u_fwd(X["k"], X["v"][:, :, :3], X["beta"][..., :3], A[:, :, :3]),
                             ValueError, "`v`", "multiple of H = 2", "3"),
    "wy A too short": (lambda: kl.recompute_w_u_fwd(X["k"], X["v"], X["beta"], A[:, :6]), ValueError, "`A`",
                       "[2, 7, 4, 64]", "[2, 6, 4, 64]"),
    "states w of other K": (lambda: kl.chunk_gated_delta_rule_fwd_h(X["g"], X["v"], X["v"]), ValueError, "`w`",
                            "[2, 7, 4, 8]", "[2, 7, 4, 6]"),
    "states from 3": (lambda: kl.chunk_gated_delta_rule_fwd_h(X["g"], X["g"], X["v"], initial_state=ones(3, 4, 8, 6)),
                      ValueError, "`initial_state`", "[2, 4, 8, 6]", "[3, 4, 8, 6]"),
    "output C": (lambda: kl.chunk_gla_fwd_o_gk(X["q"], X["v"], X["g"], A, H_STATES, 1., chunk_size=32),
                 ValueError, "`A`", "[2, 7, 4, 32]", "[2, 7, 4, 64]"),
    "output states": (lambda: kl.chunk_gla_fwd_o_gk(X["q"], X["v"], X["g"], A, ones(2, 3, 4, 8, 6), 1.),
                      ValueError, "`h`", "[2, 1, 4, 8, 6]", "[2, 3, 4, 8, 6]"),
    # operators
    "chunks of 48": (lambda: kl.chunk_kda(**X, chunk_size=48), ValueError, "`chunk_size`", "32 or 64", "48"),
    "one decay a channel": (lambda: kl.chunk_gated_delta_rule(**X), ValueError, "`g`", "[2, 7, HV]", "[2, 7, 4, 8]"),
    # modules
    "convolution's activation": (lambda: kl.ShortConvolution(8, activation="relu"), ValueError, "`activation`", "'silu'",
                                 "'relu'"),
    "convolution's channels": (lambda: kl.ShortConvolution(8)(ones(1, 7, 9)), ValueError, "`x`", "[1, 7, 8]", "[1, 7, 9]"),
    "convolution's cache": (lambda: kl.ShortConvolution(8)(ones(1, 7, 8), cache=ones(1, 8, 3)), ValueError, "`cache`",
                            "[1, 8, 4]", "[1, 8, 3]"),
    "convolution's mask": (lambda: kl.ShortConvolution(8)(ones(1, 7, 8), mask=ones(1, 6)), ValueError, "`mask`", "[1, 7]",
                           "[1, 6]"),
    "convolution's mask of 2s": (lambda: conv(mask=2 * ones(1, 7)), ValueError, "`mask`", "0 and 1", "[2.0"),
    "convolution's half mask": (lambda: conv(mask=ones(1, 7) / 2), ValueError, "`mask`", "0 and 1", "[0.5"),
    "convolution's mask as a list": (lambda: conv(mask=[[1] * 7]), TypeError, "`mask`", "a tensor", "list"),
    "convolution's mask and borders": (lambda: conv(mask=ones(1, 7), cu_seqlens=tensor([0, 7])), ValueError, "`mask`", "None",
                                       "`cu_seqlens`"),
    "convolution's packed batch of 2": (lambda: conv(ones(2, 7, 8), cu_seqlens=tensor([0, 7])), ValueError, "`x`",
                                        "of batch size 1", "2"),
    "convolution's cache of 2": (lambda: conv(cache=ones(2, 8, 4)), ValueError, "`cache`", "[1, 8, 4]", "[2, 8, 4]"),
    "convolution's integer cache": (lambda: conv(cache=ints(ones(1, 8, 4))), TypeError, "`cache`", "float32", "int64"),
    "convolution's residual": (lambda: conv(residual=ones(1, 6, 8)), ValueError, "`residual`", "[1, 7, 8]", "[1, 6, 8]"),
    "convolution of integers": (lambda: conv(ints(ones(1, 7, 8))), TypeError, "`x`", "float32", "int64"),
    "convolution's long step": (lambda: kl.ShortConvolution(8).step(ones(1, 7, 8)), ValueError, "`x`", "one a sequence",
                                "[1, 7, 8]"),
    "norm's residual": (lambda: kl.FusedRMSNormGated(8)(ones(3, 8), ones(3, 8), ones(8)), ValueError, "`residual`", "[3, 8]",
                        "[8]"),
    "norm's integers": (lambda: kl.FusedRMSNormGated(8)(ints(ones(3, 8)), ones(3, 8)), TypeError, "`x`", "float32", "int64"),
    "norm's activation": (lambda: kl.FusedRMSNormGated(8, activation="relu"), ValueError, "`activation`", "'swish'",
                          "'relu'"),
    "norm's gate": (lambda: kl.FusedRMSNormGated(8)(ones(3, 8), ones(3, 7)), ValueError, "`g`", "[3, 8]", "[3, 7]"),
    "norm's missing gate": (lambda: kl.FusedRMSNormGated(8)(ones(3, 8), None), TypeError, "`g`", "a tensor", "None"),
    "norm's width": (lambda: kl.FusedRMSNormGated(8)(ones(3, 7), ones(3, 7)), ValueError, "[7]", "[8]"),
    # layer
    "mode": (lambda: make_layer(mode="parallel"), ValueError, "`mode`", "'chunk'", "'parallel'"),
    "3 value heads": (lambda: make_layer(num_v_heads=3), ValueError, "`num_v_heads`", "num_heads = 2", "3"),
    "no heads": (lambda: make_layer(num_heads=0), ValueError, "`num_heads`", "above 0", "0"),
    "broken channels": (lambda: make_layer(expand_v=0.3), ValueError, "`expand_v`", "8", "0.3"),
    "layer's bound": (lambda: make_layer(lower_bound=5.), ValueError, "`lower_bound`", "below 0", "5.0"),
    "safe gate without bound": (lambda: make_layer(safe_gate=True), ValueError, "`lower_bound`", "safe_gate=True", "None"),
    "hidden size": (lambda: layer(ones(2, 5, 23)), ValueError, "`hidden_states`", "[2, 5, 24]", "[2, 5, 23]"),
    "token numbers": (lambda: layer(ints(ones(2, 5, 24))), TypeError, "`hidden_states`", "float32", "int64"),
    "3-D mask": (lambda: layer(attention_mask=ones(2, 5, 5)), ValueError, "`attention_mask`", "[2, 5]", "[2, 5, 5]"),
    "mask too short": (lambda: layer(attention_mask=ones(2, 4)), ValueError, "`attention_mask`", "[2, 5]", "[2, 4]"),
    "mask and borders": (lambda: layer(attention_mask=ones(2, 5), cu_seqlens=tensor([0, 5])), ValueError, "`cu_seqlens`",
                         "None", "`attention_mask`"),
    "cache as a dict": (lambda: layer(past_key_values={}), TypeError, "`past_key_values`", "KDACache", "dict"),
    "mask of halves": (lambda: layer(attention_mask=ones(2, 5) / 2), ValueError, "`attention_mask`", "0 and 1", "[0.5]"),
    "mask of too many rows": (lambda: layer(attention_mask=ones(3, 5)), ValueError, "`attention_mask`", "[2, 5]", "[3, 5]"),
    "layer's mask as a list": (lambda: layer(attention_mask=[[1] * 5] * 2), TypeError, "`attention_mask`", "a tensor", "list"),
    "padding on both sides": (lambda: layer(attention_mask=tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])), ValueError,
                              "`attention_mask`", "padded on one side", "[0, 1, 1, 1, 0] in row 1"),
    "padding in the middle": (lambda: layer(attention_mask=tensor([[1, 0, 0, 1, 1], [1] * 5]).bool()), ValueError,
                              "`attention_mask`", "padded on one side", "[1, 0, 0, 1, 1] in row 0"),
    "layer's packed batch of 2": (lambda: layer(cu_seqlens=tensor([0, 5])), ValueError, "`hidden_states`", "of batch size 1", "2"),
    "layer's tokens as a list": (lambda: layer([[1.]]), TypeError, "`hidden_states`", "a tensor", "list"),
    "cut-back cache": (lambda: filled().crop(4), ValueError, "`max_length`", "5 tokens seen", "got 4"),
    "cut-back cache by a number": (lambda: filled().crop(-1), ValueError, "`max_length`", "5 tokens seen", "got -1"),
    # Gated DeltaNet: what KDA's layer refuses
    "gdn's mode": (lambda: kl.GatedDeltaNet(24, mode="parallel"), ValueError, "`mode`", "'chunk'", "'parallel'"),
    "gdn's value heads": (lambda: kl.GatedDeltaNet(24, num_heads=2, num_v_heads=3), ValueError, "`num_v_heads`",
                          "num_heads = 2", "3"),
    "gdn's hidden size": (lambda: gdn(ones(2, 5, 23)), ValueError, "`hidden_states`", "[2, 5, 24]", "[2, 5, 23]"),
    "gdn's 3-D mask": (lambda: gdn(attention_mask=ones(2, 5, 5)), ValueError, "`attention_mask`", "[2, 5]", "[2, 5, 5]"),
    "gdn's cache of a KDA layer": (lambda: gdn(past_key_values=filled()), ValueError, "`past_key_values`", "[2, 2, 8, 16]",
                                   "[2, 2, 8, 8]"),
    # model
    "hidden act": (lambda: make_model(hidden_act="relu"), ValueError, "`hidden_act`", "'swish'", "'relu'"),
    "model's mode": (lambda: make_model(attn_mode="parallel"), ValueError, "mode`", "'chunk'", "'parallel'"),
    "model's value heads": (lambda: make_model(num_v_heads=3), ValueError, "`num_v_heads`", "num_heads = 2", "3"),
    "nothing to read": (lambda: model(None), ValueError, "`input_ids`", "inputs_embeds", "0"),
    "twice as much to read": (lambda: model(inputs_embeds=ones(2, 5, 24)), ValueError, "`input_ids`", "inputs_embeds", "2"),
    "model's 3-D mask": (lambda: model(attention_mask=ones(2, 5, 5)), ValueError, "`attention_mask`", "[2, 5]", "[2, 5, 5]"),
    "model's cache": (lambda: model(past_key_values=[]), TypeError, "`past_key_values`", "KDACache", "list"),
    "packed batch of 2": (lambda: model(cu_seqlens=tensor([0, 5])), ValueError, "of batch size 1", "`cu_seqlens`", "2"),
}


@pytest.mark.parametrize("wrong", CALLS)
def test_calls(wrong): refuses(*CALLS[wrong])


# ---- nothing half-changed

def filled(layer=kl.KimiDeltaAttention, **options):
    "The cache of a layer that has read five tokens."
    with torch.no_grad(): return layer(**LAYER | options)(ones(2, 5, 24), use_cache=True)[2]


FOREIGN = {  # a cache of another layer or batch: what it holds, what the message says
    "other heads": (dict(head_dim=4, num_heads=4), {}, "recurrent_state", "[2, 2, 8, 8]", "[2, 4, 4, 4]"),
    "wider values": (dict(expand_v=2), {}, "recurrent_state", "[2, 2, 8, 8]", "[2, 2, 8, 16]"),
    "more taps": (dict(conv_size=3), {}, "conv_state", "[2, 16, 4]", "[2, 16, 3]"),
    "no convolutions": (dict(use_short_conv=False), {}, "conv_state", "[2, 16, 4]", "got []"),
    "fewer rows": ({}, dict(hidden_states=ones(3, 1, 24)), "recurrent_state", "[3, 2, 8, 8]", "[2, 2, 8, 8]"),
    "packed otherwise": ({}, dict(hidden_states=ones(1, 3, 24), cu_seqlens=tensor([0, 1, 2, 3])), "recurrent_state",
                         "[3, 2, 8, 8]", "[2, 2, 8, 8]")}


@pytest.mark.parametrize("wrong", FOREIGN)
def test_a_foreign_cache_is_refused_and_left_alone(wrong):
    options, call, *words = FOREIGN[wrong]
    cache, own = filled(**options), kl.KimiDeltaAttention(**LAYER).eval()
    before = deepcopy(cache)
    call = dict(hidden_states=ones(2, 1, 24), past_key_values=cache, use_cache=True) | call
    refuses(lambda: own(**call), ValueError, "`past_key_values`", *words)
    assert same_caches(cache, before)
    if wrong == "no convolutions":
        bare = kl.KimiDeltaAttention(**LAYER, use_short_conv=False)
        refuses(lambda: bare(**call | dict(past_key_values=filled())), ValueError, "`past_key_values`", "conv_state", "[]")


def same_caches(a, b):
    held = lambda cache: [t for layer in cache for t in (layer["recurrent_state"], *(layer["conv_state"] or ()))]
    return a.get_seq_length() == b.get_seq_length() and all(map(torch.equal, held(a), held(b)))


REFUSED = {
    "hidden size": dict(hidden_states=ones(2, 1, 23)), "rows": dict(hidden_states=ones(3, 1, 24)),
    "mask": dict(attention_mask=ones(3, 6)), "mask values": dict(attention_mask=2 * ones(2, 6)),
    "both sides": dict(hidden_states=ones(2, 3, 24), attention_mask=tensor([[0, 1, 0], [1, 1, 1]])),
    "mask and borders": dict(attention_mask=ones(2, 6), cu_seqlens=tensor([0, 1])),
    "borders": dict(hidden_states=ones(1, 3, 24), cu_seqlens=tensor([0, 1, 2]))}


@pytest.mark.parametrize("layer", [kl.KimiDeltaAttention, kl.GatedDeltaNet])
@pytest.mark.parametrize("wrong", REFUSED)
def test_a_refused_call_leaves_the_cache_alone(wrong, layer):
    small = layer(**LAYER).eval()
    cache = filled(layer)
    before, call = deepcopy(cache), dict(hidden_states=ones(2, 1, 24), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError): small(**call | REFUSED[wrong])
    assert same_caches(cache, before)


# ---- a checkpoint of another model

PREFIX = "model.layers.0.self_attn."


def released(**changes):
    "A KDA layer of the sizes of LAYER under the names of the released models."
    n, sizes = 16, dict(b_proj=(2, 24), o_norm=(8,), o_proj=(24, 16))
    for x in "qkv": sizes |= {f"{x}_proj": (n, 24), f"{x}_conv1d": (n, 1, 4)}
    for x in "fg": sizes |= {f"{x}_a_proj": (8, 24), f"{x}_b_proj": (n, 8)}
    tensors = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    tensors |= {"A_log": torch.randn(1, 1, 2, 1), "dt_bias": torch.randn(n)} | changes
    return {PREFIX + name: x for name, x in tensors.items() if x is not None}


CHECKPOINTS = {
    "another width": ({"o_proj.weight": ones(23, 16)}, {}, ValueError, "o_proj.weight", "[24, 16]", "[23, 16]"),
    "more heads": ({"A_log": ones(1, 1, 3, 1)}, {}, ValueError, "A_log", "[2]", "[1, 1, 3, 1]"),
    "a transposed rate": ({"A_log": ones(2, 1)}, {}, ValueError, "A_log", "[2]", "[2, 1]"),
    "taps without a dimension": ({"k_conv1d.weight": ones(16, 4)}, {}, ValueError, "k_conv1d.weight", "[16, 1, 4]", "[16, 4]"),
    "a name too few": ({"dt_bias": None}, {}, ValueError, "`state_dict`", "one KDA layer", "no dt_bias"),
    "a name too many": ({"kv_a_proj.weight": ones(3)}, {}, ValueError, "`state_dict`", "one KDA layer", "kv_a_proj.weight besides"),
    "quantised": ({"q_proj.weight": ints(ones(16, 24))}, {}, TypeError, "q_proj.weight", "float32", "int64"),
    "no convolutions": ({}, dict(use_short_conv=False), ValueError, "`state_dict`", "k_conv1d.weight"),
    "shared gates": ({}, dict(num_v_heads=4), ValueError, "state_dict[", "32", "16"),
    "bounded gate": ({}, dict(lower_bound=-5.), ValueError, "`layer`", "lower_bound", "-5"),
    "strengths up to 2": ({}, dict(allow_neg_eigval=True), ValueError, "`layer`", "allow_neg_eigval", "True")}


@pytest.mark.parametrize("wrong", CHECKPOINTS)
def test_a_refused_checkpoint_leaves_the_layer_alone(wrong):
    changes, options, *what = CHECKPOINTS[wrong]
    layer = make_layer(**options)
    before = deepcopy(layer.state_dict())
    refuses(lambda: kl.load_kimi_linear_kda(released(**changes), layer, prefix=PREFIX), *what)
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_checkpoint_for_another_kind_of_layer():
    refuses(lambda: kl.load_kimi_linear_kda(released(), kl.GatedDeltaNet(**LAYER), prefix=PREFIX), TypeError, "`layer`",
            "KimiDeltaAttention", "GatedDeltaNet")
    refuses(lambda: kl.load_kimi_linear_kda({}, make_layer()), ValueError, "`state_dict`", "no A_log")


# ---- each public operator refuses

C = torch.zeros(2, 4, 64, 64)                                       # a chunk's matrices, as chunk_kda_fwd lays them out
STATE = torch.zeros(2, 4, 8, 6)


def with_k_of(heads, op): return lambda: op(**X | dict(k=ones(2, 7, heads, 8)))


EACH = {  # name: the call, the error, words of its message
    "chunk_local_cumsum": (lambda: kl.chunk_local_cumsum(X["g"], 64, cu_seqlens=tensor([0, 7])), ValueError, "batch size 1", "2"),
    "chunk_local_cumsum_scalar": (lambda: kl.chunk_local_cumsum_scalar([0.], 64), TypeError, "`g`", "a tensor", "list"),
    "chunk_local_cumsum_vector": (lambda: kl.chunk_local_cumsum_vector(X["g"], -1), ValueError, "`chunk_size`", "-1"),
    "chunk_global_cumsum": (lambda: kl.chunk_global_cumsum(ints(X["g"])), TypeError, "`s`", "float32", "int64"),
    "solve_tril": (lambda: kl.solve_tril(ints(A)), TypeError, "`A`", "float32", "int64"),
    "l2norm": (lambda: kl.l2norm([1.]), TypeError, "`x`", "a tensor", "list"),
    "l2norm_fwd": (lambda: kl.l2norm_fwd(None), TypeError, "`x`", "a tensor", "NoneType"),
    "l2norm_bwd": (lambda: kl.l2norm_bwd(X["q"], X["q"][..., 0], X["k"][:1]), ValueError, "`dy`", "[2, 7, 2, 8]", "[1, 7, 2, 8]"),
    "naive_recurrent_kda": (with_k_of(3, kl.naive_recurrent_kda), ValueError, "`k`", "[2, 7, 2, 8]", "[2, 7, 3, 8]"),
    "naive_chunk_kda": (with_k_of(3, kl.naive_chunk_kda), ValueError, "`k`", "[2, 7, 2, 8]", "[2, 7, 3, 8]"),
    "kda_gate_ref": (lambda: kl.kda_gate_ref(ones(3, 16), ones(2), 5), ValueError, "`g`", "K = 5", "16"),
    "kda_gate_fwd": (lambda: kl.kda_gate_fwd(ones(3, 16), ones(3), 8), ValueError, "`A`", "[2]", "[3]"),
    "kda_gate_bwd": (lambda: kl.kda_gate_bwd(ones(3, 16), ones(3, 16), ones(2), 8), ValueError, "`dy`", "[3, 2, 8]", "[3, 16]"),
    "fused_kda_gate": (lambda: gate(lower_bound=0.), ValueError, "`lower_bound`", "below 0", "0.0"),
    "chunk_kda_fwd_intra": (lambda: kl.chunk_kda_fwd_intra(X["q"], X["k"], X["g"], X["g"], 1.),
                            ValueError, "`beta`", "[2, 7, 4]", "[2, 7, 4, 8]"),
    "chunk_kda_bwd_intra": (lambda: kl.chunk_kda_bwd_intra(X["q"], X["k"], X["g"], X["beta"], A, A[..., :32], *[X["g"]] * 4),
                            ValueError, "`dAkk`", "[2, 7, 4, 64]", "[2, 7, 4, 32]"),
    "recompute_w_u_fwd": (lambda: kl.recompute_w_u_fwd(X["k"], X["v"], X["g"], A), ValueError, "`beta`", "[2, 7, 4]"),
    "prepare_wy_repr_bwd": (lambda: kl.prepare_wy_repr_bwd(X["k"], X["v"], X["beta"], X["g"], A, X["g"], X["g"]),
                            ValueError, "`du`", "[2, 7, 4, 6]", "[2, 7, 4, 8]"),
    "chunk_gated_delta_rule_fwd_h": (lambda: kl.chunk_gated_delta_rule_fwd_h(X["g"], X["g"], X["v"], g=X["g"]),
                                     ValueError, "`g`", "[2, 7, 4]", "[2, 7, 4, 8]"),
    "chunk_gated_delta_rule_bwd_dhu": (
        lambda: kl.chunk_gated_delta_rule_bwd_dhu(X["g"], X["g"], X["g"], X["v"], X["v"], dht=STATE.mT),
        ValueError, "`dht`", "[2, 4, 8, 6]", "[2, 4, 6, 8]"),
    "chunk_gla_fwd_o_gk": (lambda: kl.chunk_gla_fwd_o_gk(X["q"], X["v"], X["g"], A, STATE, 1.), ValueError, "`h`", "[2, 4, 8, 6]"),
    "chunk_gla_bwd_dA": (lambda: kl.chunk_gla_bwd_dA(X["v"], X["g"], 1.), ValueError, "`do`", "[2, 7, 4, 6]", "[2, 7, 4, 8]"),
    "chunk_bwd_dv_local": (lambda: kl.chunk_bwd_dv_local(X["g"], X["g"], X["v"], A=A, chunk_size=32),
                           ValueError, "`A`", "[2, 7, 4, 32]", "[2, 7, 4, 64]"),
    "chunk_kda_bwd_dqkwg": (
        lambda: kl.chunk_kda_bwd_dqkwg(X["q"], X["k"], X["g"], X["v"], H_STATES, X["g"], X["v"], H_STATES[:, :, :2], X["v"]),
        ValueError, "`dh`", "[2, 1, 4, 8, 6]", "[2, 1, 2, 8, 6]"),
    "chunk_kda": (lambda: kl.chunk_kda(**X, chunk_size=16), ValueError, "`chunk_size`", "32 or 64", "16"),
    "chunk_kda_fwd": (lambda: kl.chunk_kda_fwd(*(X[name] for name in NAMES), 1., STATE[:1]), ValueError, "`initial_state`",
                      "[2, 4, 8, 6]", "[1, 4, 8, 6]"),
    "chunk_kda_bwd": (lambda: kl.chunk_kda_bwd(*(X[name] for name in NAMES), 1., C, C[..., :32], STATE, X["v"]),
                      ValueError, "`Akk`", "[2, 4, 64, 64]", "[2, 4, 64, 32]"),
    "trace_kda": (with_k_of(3, kl.trace_kda), ValueError, "`k`", "[2, 7, 2, 8]", "[2, 7, 3, 8]"),
    "fused_recurrent_kda": (lambda: kl.fused_recurrent_kda(**X, cu_seqlens=tensor([0, 7])), ValueError, "batch size 1", "2"),
    "chunk_gated_delta_rule": (lambda: kl.chunk_gated_delta_rule(**X), ValueError, "`g`", "[2, 7, HV]", "[2, 7, 4, 8]"),
    "fused_recurrent_gated_delta_rule": (lambda: kl.fused_recurrent_gated_delta_rule(**X | dict(g=X["g"][:, :, :3, 0])),
                                         ValueError, "`g`", "multiple of H = 2", "3"),
}


@pytest.mark.parametrize("name", EACH)
def test_each_operator(name): refuses(*EACH[name])


def test_no_operator_is_left_out():
    operators = "cumsum solve_tril l2norm naive gate chunk_intra wy_fast chunk_delta_h chunk_o chunk_inter chunk fused_recurrent"
    names = {name for module in f"{operators} gated_delta_rule".split() for name in PUBLIC[module].split()}
    assert names - EACH.keys() == {"KDAGateFunction", "ChunkKDAFunction"}       # what autograd is told; functions stand before
