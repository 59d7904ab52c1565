"""Does kda_lit give the reference library's own numbers? What was recorded, and how: data/README.md."""
import pytest
import torch
from safetensors import safe_open

from conftest import DEVICE, TRITON
from helpers import GOLDEN, NAMES, distance, golden, gradients, state_dict
from kda_lit import (FusedRMSNormGated, KDAConfig, KDAForCausalLM, KimiDeltaAttention, ShortConvolution,
                     chunk_gated_delta_rule, chunk_kda, fused_kda_gate, fused_recurrent_gated_delta_rule,
                     fused_recurrent_kda, l2norm, naive_recurrent_kda, rms_norm_gated)


OP_CASES = ["op_basic", "op_headdim128", "op_gva", "op_strong_decay", "op_no_decay", "op_no_l2_scaled"]


def naive_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=False, **options):
    "The recurrence, with the one option that it does not have."
    if use_qk_l2norm_in_kernel: q, k = l2norm(q), l2norm(k)
    return naive_recurrent_kda(q, k, v, g, beta, **options)


def inputs(case):
    "Tensors and options of an operator case, under the names of `chunk_kda`."
    x = {name: case[name] for name in NAMES}
    if "h0" in case: x["initial_state"] = case["h0"]
    return x, dict(use_qk_l2norm_in_kernel=case["use_qk_l2norm"], scale=case["scale"])


@pytest.mark.parametrize("op", [chunk_kda, fused_recurrent_kda, naive_kda])
@pytest.mark.parametrize("name", OP_CASES)
def test_operator(name, op):
    case = golden(name)
    x, options = inputs(case)
    o, S = op(**x, output_final_state=True, **options)
    assert distance(o, case["o"]) < 2e-5
    assert distance(S, case["ht"]) < 2e-5


@pytest.mark.parametrize("op", [chunk_kda, fused_recurrent_kda, naive_kda])
@pytest.mark.parametrize("name", OP_CASES)
def test_operator_gradients(name, op):
    case = golden(name)
    x, options = inputs(case)
    for of, gradient in gradients(op, x, case["do"], case["dht"], **options).items():
        recorded = case["dh0" if of == "initial_state" else "d" + of]
        assert distance(gradient, recorded) < 1e-4, of


@pytest.mark.parametrize("backend", TRITON, indirect=True, ids=["triton"])
@pytest.mark.parametrize("name", OP_CASES if DEVICE == "cuda" else ["op_headdim128", "op_no_decay", "op_no_l2_scaled"])
def test_operator_in_triton(backend, name):
    "Values and gradients; without a GPU the smaller cases."
    case = golden(name)
    x, options = inputs(case)
    for got, want in zip(backend(chunk_kda, **x, output_final_state=True, **options), (case["o"], case["ht"])):
        assert distance(got.cpu(), want) < 2e-5
    for of, gradient in backend(gradients, chunk_kda, x, case["do"], case["dht"], **options).items():
        recorded = case["dh0" if of == "initial_state" else "d" + of]
        assert distance(gradient.cpu(), recorded) < 1e-4, of


@pytest.mark.parametrize("op", [chunk_kda, fused_recurrent_kda])
def test_packed_sequences(op):
    case = golden("op_varlen")
    x, options = inputs(case)
    o, S = op(**x, output_final_state=True, cu_seqlens=case["cu_seqlens"], **options)
    assert distance(o, case["o"]) < 2e-5
    assert distance(S, case["ht"]) < 2e-5


@pytest.mark.parametrize("op", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_gated_delta_rule(op):
    case = golden("gdn_op")
    x, options = inputs(case)
    o, S = op(**x, output_final_state=True, **options)
    assert distance(o, case["o"]) < 2e-5
    assert distance(S, case["ht"]) < 2e-5


@pytest.mark.parametrize("op", [chunk_kda, fused_recurrent_kda, naive_kda])
def test_gated_delta_rule_is_kda_with_one_decay_a_head(op):
    case = golden("gdn_op")
    x, options = inputs(case)
    x["g"] = x["g"][..., None].expand(*x["g"].shape, x["k"].shape[-1])
    o, S = op(**x, output_final_state=True, **options)
    assert distance(o, case["o"]) < 2e-5
    assert distance(S, case["ht"]) < 2e-5


@pytest.mark.parametrize("name", ["gate_softplus", "gate_lower_bound"])
def test_gate(name):
    case = golden(name)
    g, A, bias = (case[x].clone().requires_grad_() for x in ("g", "A_log", "dt_bias"))
    y = fused_kda_gate(g.flatten(-2), A, g.shape[-1], bias, lower_bound=case["lower_bound"])
    assert distance(y, case["y"]) < 2e-6
    for gradient, of in zip(torch.autograd.grad(y, (g, A, bias), case["dy"]), ("dg", "dA_log", "ddt_bias")):
        assert distance(gradient, case[of]) < 1e-5, of


def convolution(case):
    conv = ShortConvolution(48, kernel_size=4)
    conv.load_state_dict({"weight": case["conv_weight"]})
    return conv


def test_convolution_and_one_more_token():
    case = golden("modules")
    conv = convolution(case)
    y, cache = conv(case["conv_x"], output_final_state=True)
    assert distance(y, case["conv_y"]) < 2e-6
    assert torch.equal(cache, case["conv_cache"])
    y, cache = conv.step(case["conv_x1"], cache=cache, output_final_state=True)
    assert distance(y, case["conv_y1"]) < 2e-6
    assert torch.equal(cache, case["conv_cache1"])


def test_convolution_packed():
    case = golden("modules")
    y, cache = convolution(case)(case["conv_x"][:1], cu_seqlens=case["conv_cu_seqlens"], output_final_state=True)
    assert distance(y, case["conv_varlen_y"]) < 2e-6
    assert torch.equal(cache, case["conv_varlen_cache"])


@pytest.mark.parametrize("gate", ["swish", "sigmoid"])
def test_gated_norm(gate):
    case = golden("modules")
    x, g, weight, residual = (case[f"norm_{gate}_{name}"] for name in ("x", "g", "weight", "residual"))
    norm = FusedRMSNormGated(48, activation=gate)
    norm.load_state_dict({"weight": weight})
    y_prenorm, residual_out = norm(x, g, residual, prenorm=True)
    for y, name in [(norm(x, g), "y"), (norm(x, g, residual), "y_residual"),
                    (rms_norm_gated(x, g, weight, activation=gate, eps=norm.eps), "y"),
                    (y_prenorm, "y_prenorm"), (residual_out, "residual_out")]:
        assert distance(y, case[f"norm_{gate}_{name}"]) < 2e-6, name


def test_every_recorded_case_is_here():
    with safe_open(GOLDEN, "pt") as file: recorded = {key.split("/")[0] for key in file.keys()}
    assert recorded == {*OP_CASES, "op_varlen", "gdn_op", "gate_softplus", "gate_lower_bound", "modules", *LAYERS, "lm"}


# ---- the layer and the language model

LAYERS = ["layer", "layer_expand_v"]


def recorded_layer(name):
    layer = KimiDeltaAttention(**golden(name)["config"]).eval()
    layer.load_state_dict(state_dict(name))
    return layer, golden(name)


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, mode):
    layer, case = recorded_layer(name)
    layer.mode = mode
    assert distance(layer(case["x"])[0], case["y"]) < 2e-5
    if mode == "chunk": assert distance(layer.train()(case["x"])[0], case["y"]) < 2e-5


@pytest.mark.parametrize("name", LAYERS)
def test_layer_masked(name):
    layer, case = recorded_layer(name)
    y = layer(case["x"], case["mask"])[0]
    assert distance(y, case["y_mask"]) < 2e-5
    assert (y[case["mask"] == 0] == 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_cached(name):
    "A prefill, then one token at a time."
    layer, case = recorded_layer(name)
    first, *rest = case["x"].split([case["prefill"]] + [1] * (case["x"].shape[1] - case["prefill"]), 1)
    y, _, cache = layer(first, use_cache=True)
    ys = [y] + [layer(x, past_key_values=cache, use_cache=True)[0] for x in rest]
    assert distance(torch.cat(ys, 1), case["y_cached"]) < 2e-5


def recorded_model():
    model = KDAForCausalLM(KDAConfig(**golden("lm")["config"])).eval()
    model.load_state_dict(state_dict("lm"))
    return model, golden("lm")


def test_language_model():
    model, case = recorded_model()
    out = model(case["input_ids"], labels=case["input_ids"])
    assert distance(out.logits, case["logits"]) < 2e-5
    assert distance(out.loss, case["loss"]) < 2e-6


@pytest.mark.parametrize("use_cache", [True, False])
def test_language_model_writes_the_same_24_tokens(use_cache):
    model, case = recorded_model()
    ids = case["input_ids"]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                            eos_token_id=None, use_cache=use_cache)
    assert torch.equal(tokens, case["generated"])
