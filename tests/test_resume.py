"""A sequence cut anywhere and resumed from its state must give the numbers of the whole run."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import NAMES, borders, distance, draw
from kda_lit import KimiDeltaAttention, chunk_kda, naive_recurrent_kda


length = st.integers(0, 100)
pieces = st.lists(st.tuples(length, length, length), min_size=1, max_size=4)  # each sequence as three pieces


def rounds(lens):
    "Tokens of each round in the pack of all sequences: [(indices, cu_seqlens of the round), …]."
    starts = borders([sum(sequence) for sequence in lens]).tolist()
    for r in range(len(lens[0])):
        begins = [start + sum(sequence[:r]) for start, sequence in zip(starts, lens)]
        spans = [torch.arange(begin, begin + sequence[r]) for begin, sequence in zip(begins, lens)]
        yield torch.cat(spans), borders([len(span) for span in spans])


def resumed(x, lens, **options):
    "chunk_kda round by round; each round starts from the states that the one before left."
    o, S = torch.full_like(x["v"], float("nan")), x["initial_state"]
    for tokens, cu_seqlens in rounds(lens):
        part = {name: x[name][:, tokens] for name in NAMES}
        o[:, tokens], S = chunk_kda(**part, initial_state=S, output_final_state=True, cu_seqlens=cu_seqlens, **options)
    return o, S


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@given(lens=pieces, chunk_size=st.sampled_from([32, 64]), seed=st.integers(0, 99))
def test_operator(dtype, tol, lens, chunk_size, seed):
    totals = [sum(sequence) for sequence in lens]
    x = draw(1, sum(totals), H=1, HV=2, K=12, V=10, N=len(lens), dtype=dtype, seed=seed)
    o, S = chunk_kda(**x, output_final_state=True, cu_seqlens=borders(totals), chunk_size=chunk_size)
    o_resumed, S_resumed = resumed(x, lens, chunk_size=chunk_size)
    assert distance(o_resumed, o) < tol
    assert distance(S_resumed, S) < tol


@given(cut=st.integers(0, 140), decay=st.sampled_from([0., -1., -80., -500.]))
def test_prefill_in_chunks_then_token_by_token(cut, decay):
    x = draw(2, 140, decay=decay)
    first, rest = ({name: x[name][:, part] for name in NAMES} for part in (slice(cut), slice(cut, None)))
    o, S = chunk_kda(**first, initial_state=x["initial_state"], output_final_state=True)
    o_rest, S = naive_recurrent_kda(**rest, initial_state=S, output_final_state=True)
    want, want_S = naive_recurrent_kda(**x, output_final_state=True)
    assert distance(torch.cat([o, o_rest], 1), want) < 1e-13
    assert distance(S, want_S) < 1e-13


# ---- the layer, through its cache

LAYERS = {
    "plain": dict(),
    "shared": dict(num_v_heads=4, expand_v=0.5, allow_neg_eigval=True),
    "wide": dict(num_v_heads=4, gate_per_value_head=True, safe_gate=True, lower_bound=-5., conv_size=3, conv_bias=True),
    "bare": dict(use_short_conv=False, mode="fused_recurrent")}


def small_layer(options):
    return KimiDeltaAttention(hidden_size=24, head_dim=8, num_heads=2, **options).double().eval()


def one_by_one(layer, x, widths, mask=None):
    "The layer on piece after piece of x, through its cache."
    ys, cache, seen = [], None, 0
    for width in widths:
        seen += width
        part = None if mask is None else mask[:, :seen]          # as generation hands it over: the past, too
        y, _, cache = layer(x[:, seen - width:seen], part, cache, use_cache=True)
        ys.append(y)
    assert cache.get_seq_length(layer.layer_idx or 0) == sum(widths)
    return torch.cat(ys, 1), cache[layer.layer_idx or 0]


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@given(widths=st.lists(st.integers(0, 80), min_size=1, max_size=4))
@settings(max_examples=10)
def test_layer_in_pieces(options, widths):
    layer = small_layer(options)
    x = torch.randn(2, sum(widths), 24, dtype=torch.float64)
    y, end = one_by_one(layer, x, widths)
    want, want_end = one_by_one(layer, x, [sum(widths)])
    assert distance(y, want) < 1e-12
    assert distance(end["recurrent_state"], want_end["recurrent_state"]) < 1e-12


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@given(lens=st.lists(st.integers(0, 80), min_size=1, max_size=3), left=st.booleans(), cut=st.integers(0, 90))
@settings(max_examples=10)
def test_layer_padded_rows_equal_rows_without_padding(options, lens, left, cut):
    "Padding comes out as 0, and pieces may end in the middle of it."
    layer, width = small_layer(options), max(lens) + 3
    places = [torch.arange(width - n, width) if left else torch.arange(n) for n in lens]
    mask = torch.stack([torch.zeros(width, dtype=torch.long).index_fill(0, at, 1) for at in places])
    x = torch.randn(len(lens), width, 24, dtype=torch.float64)
    want = torch.zeros_like(x)
    for row, at in enumerate(places): want[row, at] = layer(x[row, at][None])[0][0]
    cut = min(cut, width)
    assert distance(layer(x, mask)[0], want) < 1e-12
    assert distance(one_by_one(layer, x, [cut, width - cut], mask)[0], want) < 1e-12


@given(lens=st.lists(st.integers(0, 80), min_size=1, max_size=4))
@settings(max_examples=10)
def test_layer_packed_sequences_equal_rows(lens):
    layer, x = small_layer({}), torch.randn(1, sum(lens), 24, dtype=torch.float64)
    want = torch.cat([layer(part)[0] for part in x.split(lens, 1)], 1)
    assert distance(layer(x, cu_seqlens=borders(lens))[0], want) < 1e-12
