"""The language model in the hands of other people's code: hybrids, packed batches, compilers, half precision."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening

from helpers import borders, distance
from kda_lit import KDACache, KDAConfig, KDAForCausalLM, KDAModel, SoftmaxAttention

SMALL = dict(hidden_size=24, head_dim=8, num_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=40, pad_token_id=0,
             eos_token_id=None, initializer_range=0.3)       # large weights: what a model writes depends on what it read
HYBRID = SMALL | dict(num_hidden_layers=3, attn=dict(layers=[1], num_heads=4, num_kv_heads=2))
BOTH = pytest.mark.parametrize("options", [SMALL, HYBRID], ids=["kda", "hybrid"])


def make(options=SMALL, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return KDAForCausalLM(KDAConfig(**options | more)).to(dtype).eval()


def tokens(*shape): return torch.randint(1, 40, shape)


def gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- softmax layers in between

def explicit(layer, x):
    "Softmax attention of one sequence [T, d], as the textbook writes it."
    H, D, T = 4, 6, len(x)
    q, k, v = (p(x).unflatten(-1, (-1, D)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (y.repeat_interleave(H // y.shape[1], 1) for y in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / D ** 0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return layer.o_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))


@given(lens=st.lists(st.integers(0, 30), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_softmax_layer(lens, seed):
    "A batch with padding anywhere, and a pack, against each sequence alone; then once more in two pieces."
    layer, random = SoftmaxAttention(24, 4, 2).double(), torch.Generator().manual_seed(seed)
    width = max(lens) + 2
    x = torch.randn(len(lens), width, 24, generator=random, dtype=torch.float64)
    places = [torch.randperm(width, generator=random)[:n].sort().values for n in lens]
    mask = torch.stack([torch.zeros(width, dtype=torch.long).index_fill(0, at, 1) for at in places])
    want, sequences = torch.zeros_like(x), [row[at] for row, at in zip(x, places)]
    for n, at in enumerate(places): want[n, at] = explicit(layer, sequences[n]).detach()
    assert distance(layer(x, mask)[0], want) < 1e-12
    packed = layer(torch.cat(sequences)[None], cu_seqlens=borders(lens))[0]
    assert distance(packed[0], torch.cat([row[at] for row, at in zip(want, places)])) < 1e-12
    cut = width // 2
    first, _, cache = layer(x[:, :cut], mask[:, :cut], use_cache=True)
    rest = layer(x[:, cut:], mask, cache, use_cache=True)[0]
    assert distance(torch.cat([first, rest], 1), want) < 1e-12


@given(lens=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=3))
@settings(max_examples=6)
def test_hybrid_packed_and_resumed(lens):
    "A pack, then another pack that goes on where the sequences stood, against each sequence alone."
    model, sequences = make(HYBRID), [tokens(1, a + b) for a, b in lens]
    alone = [model(s, use_cache=False).logits[0] if s.numel() else torch.zeros(0, 40) for s in sequences]
    cache, got = KDACache(), []
    for part in (0, 1):
        pieces = [s[:, :a] if part == 0 else s[:, a:] for s, (a, b) in zip(sequences, lens)]
        cu_seqlens = borders([p.shape[1] for p in pieces])
        logits = model(torch.cat(pieces, 1), past_key_values=cache, use_cache=True, cu_seqlens=cu_seqlens).logits[0]
        got.append(logits.split(cu_seqlens.diff().tolist()))
    for first, rest, want in zip(*got, alone): assert distance(torch.cat([first, rest]), want) < 1e-12


def padded(prompts):
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([F.pad(p, (width - p.shape[1], 0)) for p in prompts])
    return ids, (ids != 0).long()


def write(model, ids, mask, new=10, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **dict(do_sample=False) | options)[:, ids.shape[1]:]


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(num_beams=4, num_return_sequences=2)], ids=str)
def test_hybrid_writes_the_same_from_padded_prompts(how):
    model, prompts = make(HYBRID), [tokens(1, n) for n in (1, 5, 9)]
    ids, mask = padded(prompts)
    alone = torch.cat([write(model, p, torch.ones_like(p), **how) for p in prompts])
    assert len(alone.unique()) > 8
    assert torch.equal(write(model, ids, mask, **how), alone)
    assert torch.equal(write(model, ids, mask, use_cache=False, **how), alone)


@BOTH
def test_sampling_is_repeatable_and_the_same_without_cache(options):
    model, (ids, mask) = make(options), padded([tokens(1, 3), tokens(1, 6)])
    written = []
    for use_cache in (True, True, False):
        torch.manual_seed(1)
        written.append(write(model, ids, mask, do_sample=True, top_k=0, temperature=2., use_cache=use_cache))
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


def test_hybrid_saved_and_loaded(tmp_path):
    model, ids = make(HYBRID), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} == {n for n, _ in model.model.layers[1].attn.named_children()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is KDAConfig and type(AutoModel.from_pretrained(tmp_path)) is KDAModel
    assert again.config.attn == model.config.attn
    assert distance(again(ids).logits, model(ids).logits) < 1e-13


def test_tied_embeddings_saved_and_loaded(tmp_path):
    model, ids = make(tie_word_embeddings=True), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embeddings.weight
    assert distance(again(ids).logits, model(ids).logits) < 1e-13
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in make().parameters()) - 40 * 24


# ---- the loss

@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_of_a_pack_is_that_of_its_sequences(fused, items):
    "Also with borders of empty sequences, labels that do not count, and transformers' way to divide."
    lens = [5, 0, 70, 1, 9]
    model, ids, labels = make(fuse_linear_cross_entropy=fused).train(), tokens(1, 85), tokens(1, 85)
    labels[0, 20:30] = -100
    got, got_gradient = gradients(model, ids, labels=labels, cu_seqlens=borders(lens), num_items_in_batch=items)
    logits = torch.cat([model(part).logits[0, :-1] for part in ids.split(lens, 1) if part.numel()])
    targets = torch.cat([part[0, 1:] for part in labels.split(lens, 1)])
    want = F.cross_entropy(logits, targets, reduction="sum") / (items or (targets != -100).sum())
    model.zero_grad()
    want.backward()
    assert distance(got, want) < 1e-6                        # transformers computes its loss in float32
    assert distance(got_gradient, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5


def test_logits_are_there_unless_asked_away():
    plain, fused, ids = make(), make(fuse_linear_cross_entropy=True), tokens(2, 9)
    assert plain.train()(ids, labels=ids).logits is not None
    assert fused.train()(ids, labels=ids).logits is None
    assert fused.train()(ids).logits is not None
    assert fused.eval()(ids, labels=ids).logits is not None


def test_transformers_own_packs():
    "Its collator without padding calls the borders cu_seq_lens_q."
    model, rows = make(), [tokens(n).tolist() for n in (4, 9, 2)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row} for row in rows])
    out = model(**batch)
    want = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    assert distance(out.logits[0], want) < 1e-12
    count = [(len(row) - 1, model(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    assert distance(out.loss, sum(n * loss for n, loss in count) / sum(n for n, _ in count)) < 1e-6


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 8])], ids=str)
def test_logits_to_keep(keep):
    model, ids = make(), tokens(2, 9)
    want = model(ids).logits[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
    assert distance(model(ids, logits_to_keep=keep).logits, want) < 1e-14


# ---- memory, compilers, half precision

@BOTH
def test_gradient_checkpointing(options):
    model, ids = make(options).train(), tokens(2, 70)
    want = gradients(model, ids, labels=ids)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()    # its names in transformers 5
    for got, was in zip(gradients(model, ids, labels=ids), want): assert distance(got, was) < 1e-13


@pytest.mark.parametrize("attn", [None, dict(layers=[1], num_heads=4), dict(layers=[0, 1], num_heads=4)], ids=["kda", "hybrid", "softmax"])
def test_compiled(attn):
    "The whole model is one graph; run by PyTorch, it gives the same loss and the same gradients."
    model, ids = make(attn=attn).train(), tokens(2, 70)
    want = gradients(model, ids, labels=ids)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    for got, was in zip(gradients(torch.compile(model, backend=count), ids, labels=ids), want): assert distance(got, was) < 1e-12
    assert count.frame_count == 1


@BOTH
def test_autocast(options):
    "Within twice the error of the same model with its weights and stream in bfloat16."
    model, ids = make(options, torch.float32, initializer_range=0.1), tokens(2, 70)
    exact = model.double()(ids).logits.detach()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, (loss, gradient) = model(ids).logits, gradients(model.train(), ids, labels=ids)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and loss.isfinite()
    low = model.eval().bfloat16()(ids).logits
    assert distance(logits, exact) < 2 * distance(low, exact)


@BOTH
def test_generates_in_bfloat16(options):
    model, (ids, mask) = make(options, torch.bfloat16), padded([tokens(1, 3), tokens(1, 70)])
    assert write(model, ids, mask).shape == (2, 10)


# ---- bad input

def refuses(call, error, *words):
    with pytest.raises(error) as caught: call()
    assert type(caught.value) is error
    for word in words: assert word in str(caught.value)


IDS = torch.ones(2, 5, dtype=torch.long)
BAD = {  # what is wrong: the call, the error, words of its message
    "ids of floats": (lambda m: m(IDS.float()), TypeError, "`input_ids`", "int64", "float32"),
    "ids in one row": (lambda m: m(IDS[0]), ValueError, "`input_ids`", "[B, T]", "[5]"),
    "ids as a list": (lambda m: m([[1, 2]]), TypeError, "`input_ids`", "tensor", "list"),
    "labels too short": (lambda m: m(IDS, labels=IDS[:, 1:]), ValueError, "`labels`", "[2, 5]", "[2, 4]"),
    "labels of floats": (lambda m: m(IDS, labels=IDS.float()), TypeError, "`labels`", "int64", "float32"),
    "some logits with labels": (lambda m: m(IDS, labels=IDS, logits_to_keep=1), ValueError, "`logits_to_keep`", "labels", "1"),
    "mask of 2s": (lambda m: m(IDS, 2 * IDS), ValueError, "`attention_mask`", "0 and 1", "2"),
    "mask too short": (lambda m: m(IDS, IDS[:, 1:]), ValueError, "`attention_mask`", "[2, 5]", "[2, 4]"),
    "mask of other rows": (lambda m: m(IDS, IDS[:1]), ValueError, "`attention_mask`", "[2, 5]", "[1, 5]"),
    "mask and borders": (lambda m: m(IDS[:1], IDS[:1], cu_seqlens=borders([2, 3])), ValueError, "`cu_seqlens`",
                         "attention_mask", "both"),
    "borders of 2 rows": (lambda m: m(IDS, cu_seqlens=borders([2, 3])), ValueError, "batch size 1", "2"),
    "borders too early": (lambda m: m(IDS[:1], cu_seqlens=borders([2, 2])), ValueError, "`cu_seqlens`", "T = 5", "4"),
    "a list as cache": (lambda m: m(IDS, past_key_values=[]), TypeError, "`past_key_values`", "KDACache", "list"),
    "cache of a deeper model": (lambda m: m(IDS, past_key_values=make(num_hidden_layers=4)(IDS).past_key_values),
                                ValueError, "`past_key_values`", "layers", "4 layers"),
}


@BOTH
@pytest.mark.parametrize("wrong", BAD)
def test_bad_input(options, wrong):
    call, *what = BAD[wrong]
    refuses(lambda: call(make(options)), *what)


def test_a_refusal_of_the_last_layer_leaves_the_cache_of_the_first_alone():
    "The layers before it have run by then."
    model, other = make(HYBRID), make(HYBRID, attn=dict(layers=[1], num_heads=4))
    for ids in (IDS, tokens(3, 5)):                         # of other heads, of other rows
        cache = other(IDS).past_key_values
        before = {i: cache[i]["recurrent_state"] for i in range(3)}
        with pytest.raises(ValueError): model(ids, past_key_values=cache, use_cache=True)
        assert all(cache[i]["recurrent_state"] is before[i] for i in range(3)) and cache.get_seq_length() == 5


ATTN = {  # what is wrong with the softmax layers
    "a list": ([1], "`attn`", "dictionary", "[1]"),
    "no heads": (dict(layers=[1]), "`attn`", "'num_heads'"),
    "layer 2 of 2": (dict(layers=[2], num_heads=2), "`attn['layers']`", "num_hidden_layers = 2", "[2]"),
    "rotary positions": (dict(layers=[1], num_heads=2, rope_theta=1e4), "`attn['rope_theta']`", "None", "10000.0"),
    "a window": (dict(layers=[1], num_heads=2, window_size=9), "`attn['window_size']`", "None", "9"),
    "5 heads": (dict(layers=[1], num_heads=5), "`num_heads`", "hidden_size = 24", "5"),
    "3 key heads": (dict(layers=[1], num_heads=4, num_kv_heads=3), "`num_kv_heads`", "num_heads = 4", "3"),
}


@pytest.mark.parametrize("wrong", ATTN)
def test_bad_softmax_layers(wrong):
    attn, *words = ATTN[wrong]
    refuses(lambda: make(attn=attn), ValueError, *words)


def test_checkpoint_of_other_sizes(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes|size mismatch"):
        KDAForCausalLM.from_pretrained(tmp_path, hidden_size=48)
