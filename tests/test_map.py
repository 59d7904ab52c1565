"""Every name that stands in for one of the reference library's says where that one is; every equation says which it is."""
from pathlib import Path

import pytest

import kda_lit
from kda_lit.map import read_package

PLACES = {  # file of the reference library (fla 0.4.0): its names that have a counterpart here
    "fla/layers/utils.py": "index_first_axis index_put_first_axis get_unpad_data unpad_input pad_input",
    "fla/ops/utils/index.py":
        "prepare_lens prepare_lens_from_mask prepare_cu_seqlens_from_lens prepare_cu_seqlens_from_mask "
        "prepare_position_ids prepare_sequence_ids prepare_token_indices prepare_chunk_indices "
        "prepare_chunk_offsets",
    "fla/ops/utils/pack.py": "pack_sequence unpack_sequence",
    "fla/ops/utils/op.py": "exp log log2 safe_exp",
    "fla/ops/utils/cumsum.py":
        "chunk_local_cumsum_scalar chunk_local_cumsum_vector chunk_global_cumsum chunk_local_cumsum",
    "fla/ops/utils/solve_tril.py": "solve_tril",
    "fla/modules/l2norm.py": "l2norm_fwd l2norm_bwd l2norm",
    "fla/ops/kda/naive.py": "naive_recurrent_kda naive_chunk_kda",
    "fla/ops/kda/gate.py": "kda_gate_ref kda_gate_fwd kda_gate_bwd KDAGateFunction fused_kda_gate",
    "fla/ops/kda/chunk_intra.py": "chunk_kda_fwd_intra chunk_kda_bwd_intra",
    "fla/ops/kda/wy_fast.py": "recompute_w_u_fwd prepare_wy_repr_bwd",
    "fla/ops/common/chunk_delta_h.py": "chunk_gated_delta_rule_fwd_h chunk_gated_delta_rule_bwd_dhu",
    "fla/ops/gla/chunk.py": "chunk_gla_fwd_o_gk chunk_gla_bwd_dA",
    "fla/ops/common/chunk_o.py": "chunk_bwd_dv_local",
    "fla/ops/kda/chunk_inter.py": "chunk_kda_bwd_dqkwg",
    "fla/ops/kda/chunk.py": "chunk_kda_fwd chunk_kda_bwd ChunkKDAFunction chunk_kda",
    "fla/ops/kda/fused_recurrent.py": "fused_recurrent_kda",
    "fla/ops/gated_delta_rule/chunk.py": "chunk_gated_delta_rule",
    "fla/ops/gated_delta_rule/fused_recurrent.py": "fused_recurrent_gated_delta_rule",
    "fla/modules/convolution.py": "causal_conv causal_conv_bwd causal_conv_step ShortConvolution",
    "fla/modules/fused_norm_gate.py": "rms_norm_gated_fwd rms_norm_gated_bwd rms_norm_gated FusedRMSNormGated",
    "fla/layers/kda.py": "KimiDeltaAttention",
    "fla/layers/gated_deltanet.py": "GatedDeltaNet",
    "fla/models/kda/configuration_kda.py": "KDAConfig",
    "fla/models/kda/modeling_kda.py": "KDAModel KDAForCausalLM",
}
ENTRIES = {entry.name: entry for entry in read_package(Path(kda_lit.__file__).parent)}


@pytest.mark.parametrize("file, name", [(file, name) for file, names in PLACES.items() for name in names.split()])
def test_place_in_the_reference_library(file, name):
    assert name in ENTRIES, f"{name} is not exported by any notebook"
    assert ENTRIES[name].reference.split()[:1] == [file], f"the `Source:` line of {name} must name {file}"


def test_gradients_name_their_equation():
    "What differentiates an equation says which."
    missing = [e.name for e in ENTRIES.values() if e.name.endswith("_bwd") and not (e.equation or e.reference)]
    assert set(missing) <= {"per_token_bwd"}, missing      # a running difference, no equation of the report
