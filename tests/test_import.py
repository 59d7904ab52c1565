"""Does `import kda_lit` come cheap, with nothing it does not need, and does it offer every name under both addresses?"""
import inspect
import json
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from unittest.mock import patch

import pytest
import torch

import kda_lit

PUBLIC = {
    "utils": "use_backend to_chunks from_chunks get_unpad_data index_first_axis index_put_first_axis unpad_input pad_input "
             "prepare_lens prepare_lens_from_mask prepare_cu_seqlens_from_lens prepare_cu_seqlens_from_mask "
             "prepare_position_ids prepare_sequence_ids prepare_token_indices prepare_chunk_indices prepare_chunk_offsets "
             "pack_sequence unpack_sequence exp log log2 safe_exp",
    "cumsum": "chunk_local_cumsum chunk_local_cumsum_scalar chunk_local_cumsum_vector chunk_global_cumsum",
    "solve_tril": "solve_tril",
    "l2norm": "l2norm l2norm_fwd l2norm_bwd",
    "naive": "naive_recurrent_kda naive_chunk_kda",
    "gate": "kda_gate_ref kda_gate_fwd kda_gate_bwd KDAGateFunction fused_kda_gate",
    "chunk_intra": "chunk_kda_fwd_intra chunk_kda_bwd_intra",
    "wy_fast": "recompute_w_u_fwd prepare_wy_repr_bwd",
    "chunk_delta_h": "chunk_gated_delta_rule_fwd_h chunk_gated_delta_rule_bwd_dhu",
    "chunk_o": "chunk_gla_fwd_o_gk chunk_gla_bwd_dA chunk_bwd_dv_local",
    "chunk_inter": "chunk_kda_bwd_dqkwg",
    "chunk": "chunk_kda chunk_kda_fwd chunk_kda_bwd ChunkKDAFunction trace_kda",
    "fused_recurrent": "fused_recurrent_kda",
    "gated_delta_rule": "chunk_gated_delta_rule fused_recurrent_gated_delta_rule",
    "modules": "ShortConvolution rms_norm_gated FusedRMSNormGated causal_conv_bwd causal_conv_packed_bwd rms_norm_gated_bwd",
    "layer": "KimiDeltaAttention KDACache half_lives",
    "gated_deltanet": "GatedDeltaNet",
    "kimi_linear": "load_kimi_linear_kda",
    "model": "KDAConfig KDAModel KDAForCausalLM SoftmaxAttention chunked_cross_entropy",
    "encoder": "KDAEncoder KDAEncoderStrategy FLAEncoderFactory",
}

OPERATOR = ("q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, "
            "cu_seqlens=None")
FORWARD = "self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, output_attentions=False"
SIGNATURES = {
    "unpad_input": "q, states, attention_mask, q_len, keepdim=False",
    "pad_input": "hidden_states, indices, batch_size, seq_len",
    "index_put_first_axis": "x, indices, first_axis_dim",
    "unpack_sequence": "x, cu_seqlens, padding_side='left', desired_shape=None",
    "chunk_local_cumsum": "g, chunk_size, reverse=False, scale=None, cu_seqlens=None, head_first=False, "
                          "output_dtype=torch.float",
    "chunk_global_cumsum": "s, reverse=False, cu_seqlens=None, scale=None, head_first=False, output_dtype=torch.float",
    "solve_tril": "A, cu_seqlens=None, output_dtype=torch.float",
    "l2norm": "x, eps=1e-6, output_dtype=None",
    "l2norm_fwd": "x, eps=1e-6, output_dtype=None",
    "l2norm_bwd": "y, rstd, dy, eps=1e-6",
    "naive_recurrent_kda": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False",
    "naive_chunk_kda": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, chunk_size=64",
    "kda_gate_ref": "g, A, head_k_dim, g_bias=None, b=None, beta=1.0, threshold=20.0",
    "fused_kda_gate": "g, A, head_k_dim, g_bias=None, b=None, beta=1.0, threshold=20.0",
    "kda_gate_bwd": "dy, g, A, head_k_dim, g_bias=None, b=None, gb=None, beta=1.0, threshold=20.0",
    "chunk_kda_fwd_intra": "q, k, gk, beta, scale, cu_seqlens=None, chunk_size=64, output_dtype=torch.float32",
    "recompute_w_u_fwd": "k, v, beta, A, q=None, gk=None, cu_seqlens=None",
    "chunk_gated_delta_rule_fwd_h": "k, w, u, g=None, gk=None, initial_state=None, output_final_state=False, chunk_size=64, "
                                    "save_new_value=True, cu_seqlens=None",
    "chunk_gla_fwd_o_gk": "q, v, g, A, h, scale, cu_seqlens=None, chunk_size=64",
    "chunk_kda": OPERATOR,
    "fused_recurrent_kda": OPERATOR, "chunk_gated_delta_rule": OPERATOR, "fused_recurrent_gated_delta_rule": OPERATOR,
    "chunk_kda_bwd_intra": "q, k, g, beta, dAqk, dAkk, dq, dk, db, dg, cu_seqlens=None, chunk_size=64",
    "prepare_wy_repr_bwd": "k, v, beta, gk, A, dw, du, cu_seqlens=None",
    "chunk_gated_delta_rule_bwd_dhu": "q, k, w, do, dv, g=None, gk=None, h0=None, dht=None, scale=None, cu_seqlens=None, "
                                      "chunk_size=64",
    "chunk_gla_bwd_dA": "v, do, scale, cu_seqlens=None, chunk_size=64",
    "chunk_bwd_dv_local": "q, k, do, g=None, g_gamma=None, A=None, scale=None, cu_seqlens=None, chunk_size=64",
    "chunk_kda_bwd_dqkwg": "q, k, w, v, h, g, do, dh, dv, scale=None, cu_seqlens=None, chunk_size=64",
    "ShortConvolution": "hidden_size, kernel_size=4, bias=False, activation='silu'",
    "FusedRMSNormGated": "hidden_size, elementwise_affine=True, eps=1e-5, activation='swish'",
    "KimiDeltaAttention": "hidden_size=2048, expand_v=1, head_dim=128, num_heads=16, num_v_heads=None, mode='chunk', "
                          "use_short_conv=True, allow_neg_eigval=False, conv_size=4, conv_bias=False, layer_idx=None, "
                          "norm_eps=1e-5",
    "GatedDeltaNet": "hidden_size=2048, expand_v=2, head_dim=256, num_heads=6, num_v_heads=None, mode='chunk', "
                     "use_gate=True, use_short_conv=True, allow_neg_eigval=False, conv_size=4, conv_bias=False, "
                     "layer_idx=None, norm_eps=1e-5",
    "rms_norm_gated": "x, g, weight, bias=None, activation='swish', residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6",
    "KimiDeltaAttention.forward": FORWARD, "GatedDeltaNet.forward": FORWARD,
    "ShortConvolution.forward": "self, x, residual=None, mask=None, cache=None, output_final_state=False, cu_seqlens=None",
    "ShortConvolution.step": "self, x, residual=None, cache=None, output_final_state=False, cu_seqlens=None",
    "FusedRMSNormGated.forward": "self, x, g, residual=None, prenorm=False, residual_in_fp32=False",
}

HEAVY = ("triton", "transformers", "matplotlib")

MEASURE = f"""
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import kda_lit
seconds = time.perf_counter() - start
heavy = [name for name in {HEAVY} if name in set(sys.modules) - before]
print(json.dumps(dict(seconds=seconds, heavy=heavy)))
"""

WITHOUT = f"""
import sys
for name in {HEAVY}: sys.modules[name] = None                       # as if it were not installed
import kda_lit.l2norm, kda_lit.solve_tril
import torch
kda_lit.solve_tril(torch.zeros(1, 16, 1, 16)), kda_lit.l2norm(torch.ones(1, 2))
o, S = kda_lit.chunk_kda(*torch.rand(3, 1, 5, 2, 8), -torch.rand(1, 5, 2, 8), torch.rand(1, 5, 2))
print("works", tuple(o.shape))
"""


def fresh(program):
    "What a program prints in an interpreter of its own."
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_light():
    "The best of up to three runs: other programs may slow down one of them."
    for _ in range(3):
        found = json.loads(fresh(MEASURE))
        assert found["heavy"] == []
        if found["seconds"] < 2: return
    pytest.fail(f"import kda_lit takes {found['seconds']:.1f} s beyond torch's own import")


def test_runs_where_nothing_heavy_is_installed():
    "And l2norm, solve_tril stay functions, though modules of the same name are imported."
    assert fresh(WITHOUT).strip() == "works (1, 5, 2, 8)"


@pytest.mark.parametrize("module", PUBLIC)
def test_names(module):
    home = import_module(f"kda_lit.{module}")
    for name in PUBLIC[module].split():
        assert getattr(kda_lit, name) is getattr(home, name)
        assert callable(getattr(kda_lit, name)) and name in dir(kda_lit)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    "Names, order and defaults of the reference library; what we add can only be given by name."
    theirs = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None")).parameters.values()
    ours = list(inspect.signature(attrgetter(name)(kda_lit)).parameters.values())
    both = list(zip(theirs, ours, strict=False))
    assert len(both) == len(theirs)
    for want, got in both: assert (got.name, got.default) == (want.name, want.default)
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(both):])


def test_make_tensor_descriptor_is_tritons():
    "Handed on when it is asked for; without Triton the error says what to install."
    assert "make_tensor_descriptor" in dir(kda_lit)
    with pytest.raises(ImportError, match="pip install 'triton"): without_triton()
    language = pytest.importorskip("triton.language")
    for home in (kda_lit, kda_lit.utils): assert home.make_tensor_descriptor is language.make_tensor_descriptor


def without_triton():
    with patch.dict(sys.modules, {"triton": None, "triton.language": None}): return kda_lit.make_tensor_descriptor


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"): kda_lit.no_such_name
