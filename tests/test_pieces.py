"""Do the pieces of the notebooks, chained by hand, give `chunk_kda`? Do packing functions undo each other?"""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import borders, distance, draw
from kda_lit import (chunk_gated_delta_rule_fwd_h, chunk_gla_fwd_o_gk, chunk_global_cumsum, chunk_kda, chunk_kda_fwd_intra,
                     chunk_local_cumsum, from_chunks, fused_kda_gate, get_unpad_data, index_first_axis, l2norm, pack_sequence,
                     pad_input, prepare_chunk_indices, prepare_chunk_offsets, prepare_cu_seqlens_from_lens,
                     prepare_cu_seqlens_from_mask, prepare_lens, prepare_lens_from_mask, prepare_position_ids,
                     prepare_sequence_ids, prepare_token_indices, recompute_w_u_fwd, solve_tril, to_chunks, unpack_sequence,
                     unpad_input)

PACK = [3, 0, 65, 64, 1]
ragged = st.lists(st.integers(0, 90), min_size=1, max_size=5)


def chained(q, k, v, g, beta, initial_state, cu_seqlens, C):
    "KDA as the reference library lays it out: five public functions, one after the other."
    scale, dtype = q.shape[-1] ** -0.5, q.dtype
    G = chunk_local_cumsum(g, C, cu_seqlens=cu_seqlens, output_dtype=dtype)
    Aqk, Akk = chunk_kda_fwd_intra(q, k, G, beta, scale, cu_seqlens, C, output_dtype=dtype)
    w, u, qg, kg = recompute_w_u_fwd(k, v, beta, Akk, q, G, cu_seqlens)
    h, v_new, S = chunk_gated_delta_rule_fwd_h(kg, w, u, gk=G, initial_state=initial_state, output_final_state=True,
                                               chunk_size=C, cu_seqlens=cu_seqlens)
    return chunk_gla_fwd_o_gk(q, v_new, G, Aqk, h, scale, cu_seqlens, C), S


@pytest.mark.parametrize("C", [32, 64])
@pytest.mark.parametrize("cu_seqlens", [None, borders(PACK)], ids=["batch", "packed"])
def test_pieces_make_the_operator(backend, cu_seqlens, C):
    B, T, N = (2, 70, 2) if cu_seqlens is None else (1, sum(PACK), len(PACK))
    x = draw(B, T, H=1, HV=2, K=12, V=20, N=N)
    got = backend(chained, **x, cu_seqlens=cu_seqlens, C=C)
    want = chunk_kda(**{name: backend.rounded(t) for name, t in x.items()}, output_final_state=True, cu_seqlens=cu_seqlens)
    for a, b in zip(got, want): assert distance(a.cpu(), b) < 512 * backend.eps


@pytest.mark.parametrize("cu_seqlens", [None, borders(PACK)], ids=["batch", "packed"])
@pytest.mark.parametrize("gate", ["none", "one a head"])
def test_states_with_fewer_decays(gate, cu_seqlens):
    "No decay, and one decay a head (then plain keys go in), are special cases of one decay a channel."
    B, T, N = (2, 130, 2) if cu_seqlens is None else (1, sum(PACK), len(PACK))
    x = draw(B, T, N=N)
    g = x["g"][..., 0] * (gate != "none")
    G = chunk_local_cumsum(g, 64, cu_seqlens=cu_seqlens, output_dtype=torch.float64)
    Gk = G[..., None].expand_as(x["k"])
    A = torch.randn(B, T, 2, 64, dtype=torch.float64)
    w, u, _, kg = recompute_w_u_fwd(x["k"], x["v"], x["beta"], A, gk=Gk, cu_seqlens=cu_seqlens)
    options = dict(initial_state=x["initial_state"], output_final_state=True, cu_seqlens=cu_seqlens)
    got = chunk_gated_delta_rule_fwd_h(x["k"], w, u, g=None if gate == "none" else G, **options)
    want = chunk_gated_delta_rule_fwd_h(kg, w, u, gk=Gk, **options)
    for a, b in zip(got, want): assert distance(a, b) < 1e-12


@pytest.mark.parametrize("C", [32, 64])
def test_solve_tril_is_the_inverse_inside_intra(C):
    "Akk from A = β k e^G (k e^−G)ᵀ below the diagonal; mild decays, so that e^−G may be formed here."
    x = draw(1, 100, decay=-0.05)
    G = chunk_local_cumsum(x["g"], C, output_dtype=torch.float64)
    k, G_c, beta = (to_chunks(t, None, C) for t in (x["k"], G, x["beta"]))
    A = (beta[..., None] * (k * G_c.exp()) @ (k * (-G_c).exp()).mT).tril(-1)
    Akk = chunk_kda_fwd_intra(x["q"], x["k"], G, x["beta"], 1.0, None, C, torch.float64)[1]
    assert distance(solve_tril(from_chunks(A, None, 1, 100), output_dtype=torch.float64), Akk) < 1e-13


def test_raw_gates_to_outputs():
    "What a layer does: [B, T, H*K] gates and raw strengths, norms, operator; in a batch and as one pack."
    B, T, H, K = 3, 20, 2, 8
    z, b, A = torch.randn(B, T, H * K), torch.randn(B, T, H), torch.randn(H)
    x = draw(B, T, H, K, dtype=torch.float32)
    x["g"], x["beta"] = fused_kda_gate(z, A, K, torch.randn(H * K), b)
    x["q"], x["k"] = l2norm(3 * x["q"]), l2norm(2 * x["k"])
    assert x["g"].shape == (B, T, H, K) and (x["g"] < 0).all() and x["beta"].shape == (B, T, H)
    packed = {name: t if name == "initial_state" else t.flatten(0, 1)[None] for name, t in x.items()}
    o, S = chunk_kda(**x, output_final_state=True)
    o_packed, S_packed = chunk_kda(**packed, output_final_state=True, cu_seqlens=borders([T] * B))
    assert distance(o_packed.unflatten(1, (B, T))[0], o) < 1e-6
    assert distance(S_packed, S) < 1e-6


# ---- packing: every way there has a way back

@given(ragged, st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_unpack_then_pack(lens, side, extra):
    cu_seqlens = borders(lens)
    x = torch.randn(1, sum(lens), 2, 3)
    padded = unpack_sequence(x, cu_seqlens, side, (len(lens), max(lens) + extra))
    assert padded.shape == (len(lens), max(lens) + extra, 2, 3)
    assert torch.equal(pack_sequence(padded, cu_seqlens, side), x)
    assert padded.count_nonzero() == x.count_nonzero()


@given(ragged, st.randoms(use_true_random=False))
def test_pad_then_unpad(lens, random):
    "Padding may stand anywhere in a row, not only at its ends."
    width = max(lens) + 2
    mask = torch.zeros(len(lens), width, dtype=torch.long)
    for row, length in zip(mask, lens): row[random.sample(range(width), length)] = 1
    x = torch.randn(len(lens), width, 3) * mask[..., None]
    indices, cu_seqlens, longest = get_unpad_data(mask)
    packed = index_first_axis(x.flatten(0, 1), indices)
    assert cu_seqlens.tolist() == borders(lens).tolist() and longest == max(lens)
    assert torch.equal(pad_input(packed, indices, *mask.shape), x)
    q, (state,), at, (cu_q, cu_k), (longest_q, _) = unpad_input(x, (x,), mask, width)
    assert torch.equal(q, packed) and torch.equal(state, packed) and torch.equal(at, indices)
    assert torch.equal(cu_q, cu_k) and longest_q == longest


@given(ragged, st.sampled_from([1, 16, 32, 64]))
def test_chunks_and_back(lens, C):
    cu_seqlens = borders(lens)
    x = torch.randn(1, sum(lens), 2, 3)
    chunks = to_chunks(x, cu_seqlens, C)
    assert len(chunks) == sum(-(-length // C) for length in lens) == prepare_chunk_offsets(cu_seqlens, C)[-1]
    assert torch.equal(from_chunks(chunks, cu_seqlens, 1, sum(lens)), x)
    assert chunks.count_nonzero() == x.count_nonzero()
    rows = x.expand(2, -1, -1, -1)
    assert torch.equal(from_chunks(to_chunks(rows, None, C), None, 2, sum(lens)), rows)


@given(ragged, st.integers(1, 70))
def test_lengths_borders_and_ids_agree(lens, C):
    cu_seqlens = prepare_cu_seqlens_from_lens(torch.tensor(lens))
    assert prepare_lens(cu_seqlens).tolist() == lens
    pairs = [[n, t] for n, length in enumerate(lens) for t in range(length)]
    assert prepare_token_indices(cu_seqlens).tolist() == pairs
    assert prepare_sequence_ids(cu_seqlens).tolist() == [n for n, _ in pairs]
    assert prepare_position_ids(cu_seqlens).tolist() == [t for _, t in pairs]
    chunks = [[n, i] for n, length in enumerate(lens) for i in range(-(-length // C))]
    assert prepare_chunk_indices(cu_seqlens, C).tolist() == chunks
    mask = torch.arange(max(lens) + 1) < torch.tensor(lens)[:, None]
    assert prepare_lens_from_mask(mask).tolist() == lens
    assert torch.equal(prepare_cu_seqlens_from_mask(mask), cu_seqlens)


@given(ragged, st.sampled_from([16, 64]), st.booleans())
def test_cumulative_sums(lens, C, reverse):
    "Sums inside a chunk and inside a sequence, against a loop."
    cu_seqlens, g = borders(lens), torch.randn(1, sum(lens), 2, dtype=torch.float64)
    options = dict(reverse=reverse, cu_seqlens=cu_seqlens, output_dtype=None)
    turn = lambda x: x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    sequences = g.split(lens, 1)
    want = torch.cat([turn(s) for s in sequences], 1)
    want_local = torch.cat([turn(c) for s in sequences for c in s.split(C, 1)], 1)
    assert distance(chunk_global_cumsum(g, **options), want) < 1e-13
    assert distance(chunk_local_cumsum(g, C, **options), want_local) < 1e-13
