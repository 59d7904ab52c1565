"""A sequence cut anywhere and resumed from its state must give the numbers of the whole run."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import NAMES, borders, distance, draw, gradients
from kda_lit import (GatedDeltaNet, KDAConfig, KDAForCausalLM, KimiDeltaAttention, chunk_gated_delta_rule, chunk_kda,
                     fused_recurrent_gated_delta_rule, fused_recurrent_kda, naive_recurrent_kda)


length = st.integers(0, 100)
ragged = st.lists(st.lists(length, min_size=1, max_size=4), min_size=1, max_size=4)  # each sequence in pieces of its own
HARD = [[70, 1, 0, 64], [0], [3, 2], [65, 63]]
FLOATS = pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def rounds(lens):
    "Tokens of each round in the pack of all sequences: [(indices, cu_seqlens of the round), …]."
    starts = borders([sum(sequence) for sequence in lens]).tolist()
    for r in range(max(map(len, lens))):
        begins = [start + sum(sequence[:r]) for start, sequence in zip(starts, lens)]
        sizes = [sequence[r] if r < len(sequence) else 0 for sequence in lens]
        spans = [torch.arange(begin, begin + size) for begin, size in zip(begins, sizes)]
        yield torch.cat(spans), borders(sizes)


def one_decay(op):
    "A gated delta rule that takes the decays of the first channel."
    return lambda g, **x: op(g=g[..., 0], **x)


OPERATORS = {
    "chunks of 64": chunk_kda, "chunks of 32": partial(chunk_kda, chunk_size=32), "by token": fused_recurrent_kda,
    "one decay, chunks": one_decay(chunk_gated_delta_rule), "one decay, by token": one_decay(fused_recurrent_gated_delta_rule)}


def resumed(op, x, lens):
    "An operator round by round; each round starts from the states that the one before left."
    o, S = torch.full_like(x["v"], float("nan")), x["initial_state"]
    for tokens, cu_seqlens in rounds(lens):
        part = {name: x[name][:, tokens] for name in NAMES}
        o[:, tokens], S = op(**part, initial_state=S, output_final_state=True, cu_seqlens=cu_seqlens)
    return o, S


@FLOATS
@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
@given(lens=ragged, decay=st.sampled_from([None, 0., -80.]), seed=st.integers(0, 99))
@example(lens=HARD, decay=None, seed=0)
@example(lens=HARD, decay=-500., seed=0)
@settings(max_examples=12)
def test_operator(op, dtype, tol, lens, decay, seed):
    totals = [sum(sequence) for sequence in lens]
    x = draw(1, sum(totals), H=1, HV=2, K=12, V=10, N=len(lens), decay=decay, dtype=dtype, seed=seed)
    o, S = op(**x, output_final_state=True, cu_seqlens=borders(totals))
    o_resumed, S_resumed = resumed(op, x, lens)
    assert distance(o_resumed, o) < tol
    assert distance(S_resumed, S) < tol


@given(lens=ragged)
@example(lens=HARD)
@settings(max_examples=8)
def test_gradients_through_the_states(lens):
    "Gradients that come back through the states from piece to piece are those of the whole run."
    totals = [sum(sequence) for sequence in lens]
    x = {n: t.requires_grad_() for n, t in draw(1, sum(totals), H=1, HV=2, K=8, V=6, N=len(lens)).items()}
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    grads = lambda o, S: torch.autograd.grad((o, S), list(x.values()), (do, dS), materialize_grads=True)
    whole = grads(*chunk_kda(**x, output_final_state=True, cu_seqlens=borders(totals)))
    for name, a, b in zip(x, grads(*resumed(chunk_kda, x, lens)), whole): assert distance(a, b) < 1e-11, name


OPERATORS = [chunk_kda, fused_recurrent_kda, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


@pytest.mark.parametrize("op", OPERATORS)
@given(cut=st.integers(0, 140), decay=st.sampled_from([None, 0., -20., -500.]), chunk_size=st.sampled_from([32, 64]))
@settings(max_examples=8)
def test_gradients_flow_back_through_the_cut(op, cut, decay, chunk_size):
    "The first piece learns of the second only through the state between them."
    x = draw(2, 140, HV=4, K=6, V=5, decay=decay)
    if op in OPERATORS[2:]: x["g"] = x["g"][..., 0].clone()
    options = dict(chunk_size=chunk_size) if op is chunk_kda else {}

    def in_two(initial_state, output_final_state, **x):
        first, rest = ({name: t[:, part] for name, t in x.items()} for part in (slice(cut), slice(cut, None)))
        o, S = op(**first, initial_state=initial_state, output_final_state=True, **options)
        o_rest, S = op(**rest, initial_state=S, output_final_state=True, **options)
        return torch.cat([o, o_rest], 1), S

    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    want, got = gradients(op, x, do, dS, **options), gradients(in_two, x, do, dS)
    for name in want: assert distance(got[name], want[name]) < 1e-11, name


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
    "plain": (KimiDeltaAttention, dict()),
    "shared": (KimiDeltaAttention, dict(num_v_heads=4, expand_v=0.5, allow_neg_eigval=True)),
    "wide": (KimiDeltaAttention, dict(num_v_heads=4, gate_per_value_head=True, safe_gate=True, lower_bound=-5., conv_size=3,
                                      conv_bias=True)),
    "bare": (KimiDeltaAttention, dict(use_short_conv=False, mode="fused_recurrent")),
    "one decay": (GatedDeltaNet, dict(num_v_heads=4, layer_idx=2)),
    "one decay, no gate": (GatedDeltaNet, dict(use_gate=False, expand_v=1, allow_neg_eigval=True, conv_bias=True))}
EACH_LAYER = pytest.mark.parametrize("kind", LAYERS)


def small_layer(kind, dtype=torch.float64):
    layer, options = LAYERS[kind]
    return layer(hidden_size=24, head_dim=8, num_heads=2, **options).to(dtype).eval()


def one_by_one(layer, x, widths, mask=None, whole_mask=True):
    "The layer on piece after piece of x, through its cache."
    ys, cache, seen, i = [], None, 0, layer.layer_idx or 0
    for width in widths:
        seen += width
        part = None if mask is None else mask[:, :seen]          # as generation hands it over: the past, too
        if part is not None and not whole_mask: part = part[:, seen - width:]
        y, _, cache = layer(x[:, seen - width:seen], part, cache, use_cache=True)
        ys.append(y)
    assert cache.get_seq_length(i) == sum(widths)
    return torch.cat(ys, 1), cache[i]


@EACH_LAYER
@given(widths=st.lists(st.integers(0, 80), min_size=1, max_size=4))
@settings(max_examples=6)
def test_layer_in_pieces(kind, widths):
    layer = small_layer(kind)
    x = torch.randn(2, sum(widths), 24, dtype=torch.float64)
    y, end = one_by_one(layer, x, widths)
    want, want_end = one_by_one(layer, x, [sum(widths)])
    assert distance(y, want) < 1e-12
    assert distance(end["recurrent_state"], want_end["recurrent_state"]) < 1e-12


@FLOATS
@EACH_LAYER
@given(lens=ragged)
@example(lens=HARD)
@settings(max_examples=8)
def test_layer_on_a_ragged_batch_in_pieces(kind, dtype, tol, lens):
    "Packed, every sequence cut as it likes; against each sequence alone."
    layer, totals = small_layer(kind, dtype), [sum(sequence) for sequence in lens]
    x = torch.randn(1, sum(totals), 24, dtype=dtype)
    y, cache = torch.full_like(x, float("nan")), None
    for tokens, cu_seqlens in rounds(lens):
        y[:, tokens], _, cache = layer(x[:, tokens], None, cache, True, cu_seqlens=cu_seqlens)
    ys, _, caches = zip(*(layer(part, use_cache=True) for part in x.split(totals, 1)))
    assert distance(y, torch.cat(ys, 1)) < tol
    held, alone = (c[layer.layer_idx or 0] for c in (cache, caches[0]))
    assert distance(held["recurrent_state"][:1], alone["recurrent_state"]) < tol


@FLOATS
@EACH_LAYER
@given(lens=st.lists(st.integers(0, 80), min_size=1, max_size=3), left=st.lists(st.booleans(), min_size=3, max_size=3),
       cuts=st.lists(st.integers(0, 83), max_size=3), whole_mask=st.booleans())
@example(lens=[66, 0, 1], left=[True, False, False], cuts=[1, 3, 68], whole_mask=True)
@settings(max_examples=8)
def test_layer_padded_rows_equal_rows_without_padding(kind, dtype, tol, lens, left, cuts, whole_mask):
    "Every row padded on a side of its own. Padding comes out as 0, and pieces may end in the middle of it."
    layer, width = small_layer(kind, dtype), max(lens) + 3
    places = [torch.arange(width - n, width) if side else torch.arange(n) for n, side in zip(lens, left)]
    mask = torch.stack([torch.zeros(width, dtype=torch.long).index_fill(0, at, 1) for at in places])
    x = torch.randn(len(lens), width, 24, dtype=dtype)
    want = torch.zeros_like(x)
    for row, at in enumerate(places): want[row, at] = layer(x[row, at][None])[0][0]
    y = layer(x, mask)[0]
    assert distance(y, want) < tol and (y[mask == 0] == 0).all()
    cuts = sorted(min(cut, width) for cut in cuts)
    widths = [b - a for a, b in zip([0, *cuts], [*cuts, width])]
    assert distance(one_by_one(layer, x, widths, mask, whole_mask)[0], want) < tol


@EACH_LAYER
@given(lens=st.lists(st.integers(0, 80), min_size=1, max_size=4))
@settings(max_examples=6)
def test_layer_packed_sequences_equal_rows(kind, lens):
    layer, x = small_layer(kind), torch.randn(1, sum(lens), 24, dtype=torch.float64)
    want = torch.cat([layer(part)[0] for part in x.split(lens, 1)], 1)
    assert distance(layer(x, cu_seqlens=borders(lens))[0], want) < 1e-12


# ---- the language model, through its cache

def small_model(**options):
    "Large weights, so that what a model writes depends on what it read."
    return KDAForCausalLM(KDAConfig(
        hidden_size=24, head_dim=8, num_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=40, pad_token_id=0,
        eos_token_id=None, initializer_range=0.3, **options)).double().eval()


def tokens(*shape): return torch.randint(1, 40, shape)


@given(widths=st.lists(st.integers(1, 80), min_size=1, max_size=4))
@settings(max_examples=6)
def test_model_in_pieces(widths):
    model, ids, cache, logits = small_model(), tokens(2, sum(widths)), None, []
    for part in ids.split(widths, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    assert cache.get_seq_length() == sum(widths)
    assert distance(torch.cat(logits, 1), model(ids).logits) < 1e-12


@FLOATS
@given(lens=st.lists(st.integers(0, 60), min_size=1, max_size=3), left=st.booleans(), cuts=st.lists(st.integers(0, 60), max_size=3))
@settings(max_examples=6)
def test_model_on_a_padded_batch_in_pieces(dtype, tol, lens, left, cuts):
    "Against each row alone and in one go."
    model, width, cache = small_model().to(dtype), max(lens) + 2, None
    places = [torch.arange(width - n, width) if left else torch.arange(n) for n in lens]
    mask = torch.stack([torch.zeros(width, dtype=torch.long).index_fill(0, at, 1) for at in places])
    ids, logits = tokens(len(lens), width), []
    cuts = sorted({min(cut, width) for cut in cuts} - {0, width})
    for a, b in zip([0, *cuts], [*cuts, width]):
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    logits = torch.cat(logits, 1)
    for row, at in enumerate(places): assert distance(logits[row, at], model(ids[row, at][None]).logits[0]) < tol


def padded_left(prompts):
    "One rectangle of token numbers, and its mask."
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([F.pad(p, (width - p.shape[1], 0)) for p in prompts])
    return ids, (ids != 0).long()


def write(model, ids, mask, new=12, **options):
    options = dict(do_sample=False) | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[:, ids.shape[1]:]


@pytest.mark.parametrize("lens", [[1, 5, 9], [70, 3]])
def test_model_writes_the_same_from_padded_prompts(lens):
    model, prompts = small_model(), [tokens(1, n) for n in lens]
    ids, mask = padded_left(prompts)
    alone = torch.cat([write(model, p, torch.ones_like(p)) for p in prompts])
    assert len(alone.unique()) > 8
    assert torch.equal(write(model, ids, mask), alone)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(num_beams=4, num_return_sequences=2)], ids=str)
def test_model_writes_the_same_with_and_without_cache(how):
    model = small_model()
    ids, mask = padded_left([tokens(1, 4), tokens(1, 7)])
    assert torch.equal(write(model, ids, mask, **how), write(model, ids, mask, use_cache=False, **how))


def test_model_resumes_writing_from_its_cache():
    model, ids = small_model(), tokens(2, 6)
    whole = write(model, ids, torch.ones_like(ids))
    half = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                          return_dict_in_generate=True)
    rest = write(model, half.sequences, torch.ones_like(half.sequences), 7, past_key_values=half.past_key_values)
    assert torch.equal(torch.cat([half.sequences[:, 6:], rest], 1), whole)


def test_model_resumes_from_a_file(tmp_path):
    model, ids = small_model(num_v_heads=4, expand_v=0.5, safe_gate=True, lower_bound=-5.), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = KDAForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert distance(loaded(ids).logits, model(ids).logits) < 1e-13
    assert loaded.model.layers[0].attn.lower_bound == -5
