"""Encoders by name: what they compute from padded and packed sequences, how they are saved, what the factory refuses."""
import pytest
import torch
from torch import ones

from helpers import borders, distance
from kda_lit import FLAEncoderFactory, KDAConfig, KDAEncoder, KDAEncoderStrategy, KDAForCausalLM

SMALL = dict(hidden_size=24, head_dim=8, num_heads=2, num_hidden_layers=2, intermediate_size=32)


def strategy(**options): return FLAEncoderFactory.create("kda", n_features=5, **SMALL | options).double().eval()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("options", [{}, dict(attn=dict(layers=[1], num_heads=2)), dict(attn_mode="fused_recurrent")], ids=str)
def test_a_padded_batch_equals_its_rows(pooling, options):
    encoder, lens = strategy(pooling=pooling, **options), [70, 3, 1, 33]
    x, mask = torch.randn(4, 72, 5, dtype=torch.float64), torch.zeros(4, 72, dtype=torch.long)
    places = [torch.arange(n) + (72 - n) * (i % 2) for i, n in enumerate(lens)]     # padded right, left, right, left
    for row, at in zip(mask, places): row[at] = 1
    alone = torch.cat([encoder(row[at][None])[0] for row, at in zip(x, places)])
    assert distance(encoder(x, mask)[0], alone) < 1e-12


def test_gradients_reach_every_weight():
    encoder = strategy().train()
    encoder(torch.randn(2, 9, 5, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_encoder_packed_cached_and_saved(tmp_path):
    encoder, x = KDAEncoder(KDAConfig(**SMALL)).double().eval(), torch.randn(1, 20, 24, dtype=torch.float64)
    alone = torch.cat([encoder(part).last_hidden_state for part in x.split([7, 13], 1)], 1)
    assert distance(encoder(x, cu_seqlens=borders([7, 13])).last_hidden_state, alone) < 1e-12
    whole, first = encoder(x), encoder(x[:, :9], use_cache=True)
    rest = encoder(x[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    assert distance(torch.cat([first[0], rest[0]], 1), whole.last_hidden_state) < 1e-12
    encoder.save_pretrained(tmp_path)
    assert distance(KDAEncoder.from_pretrained(tmp_path)(x).last_hidden_state, whole.last_hidden_state) < 1e-13


def test_encoder_of_a_language_model(tmp_path):
    model, ids = KDAForCausalLM(KDAConfig(vocab_size=40, **SMALL)).eval(), torch.randint(40, (2, 9))
    model.save_pretrained(tmp_path)
    encoder = KDAEncoder.from_pretrained(tmp_path).eval()
    x = model.model.embeddings(ids)
    assert distance(encoder(x).last_hidden_state, model.model(ids).last_hidden_state) < 1e-6


@pytest.fixture
def clean():
    "Names given in a test are taken back."
    before = dict(FLAEncoderFactory._strategies)
    yield
    FLAEncoderFactory._strategies.clear()
    FLAEncoderFactory._strategies.update(before)


def test_factory(clean):
    assert FLAEncoderFactory.list_available() == ["kda"]
    assert type(strategy()) is KDAEncoderStrategy
    made = FLAEncoderFactory.register("twice", lambda n: torch.nn.Linear(n, 2 * n))
    assert FLAEncoderFactory.register("twice", made) is made              # the same once more, as when a module is reloaded
    assert FLAEncoderFactory.create("twice", n=3).out_features == 6
    assert FLAEncoderFactory.list_available() == ["kda", "twice"]

    @FLAEncoderFactory.register("decorated")
    class Mine(torch.nn.Identity): pass
    assert type(FLAEncoderFactory.create("decorated")) is Mine


BAD = {  # what is wrong: the call, the error, words of its message
    "unknown name": (lambda: FLAEncoderFactory.create("rwkv"), ValueError, "`name`", "'kda'", "'rwkv'"),
    "near miss": (lambda: FLAEncoderFactory.create("KDA"), ValueError, "`name`", "'kda'", "'KDA'"),
    "taken name": (lambda: FLAEncoderFactory.register("kda", torch.nn.Linear), ValueError, "`name`", "not taken", "'kda'"),
    "no name": (lambda: FLAEncoderFactory.register("", torch.nn.Linear), TypeError, "`name`", "''"),
    "number as name": (lambda: FLAEncoderFactory.register(5, torch.nn.Linear), TypeError, "`name`", "int"),
    "no strategy": (lambda: FLAEncoderFactory.register("x", 5), TypeError, "`strategy`", "class", "int"),
    "misspelt option": (lambda: strategy(hiden_size=3), ValueError, "`options`", "KDAConfig", "hiden_size"),
    "pooling": (lambda: strategy(pooling="max"), ValueError, "`pooling`", "'mean'", "'max'"),
    "no features": (lambda: KDAEncoderStrategy(0), ValueError, "`n_features`", "above 0", "0"),
    "other features": (lambda: strategy()(ones(2, 9, 4).double()), ValueError, "`x`", "[2, 9, 5]", "[2, 9, 4]"),
    "a matrix": (lambda: strategy()(ones(9, 5).double()), ValueError, "`x`", "[B, T, F]", "[9, 5]"),
    "whole numbers": (lambda: strategy()(ones(2, 9, 5).long()), TypeError, "`x`", "float32", "int64"),
    "mask of other length": (lambda: strategy()(ones(2, 9, 5).double(), ones(2, 10)), ValueError, "`attention_mask`", "[2, 9]",
                             "[2, 10]"),
    "mask of 2s": (lambda: strategy()(ones(2, 9, 5).double(), 2 * ones(2, 9)), ValueError, "`attention_mask`", "0 and 1", "2"),
    "vectors of other width": (lambda: KDAEncoder(KDAConfig(**SMALL))(ones(2, 9, 23)), ValueError, "`inputs_embeds`", "24", "23"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input(wrong):
    call, error, *words = BAD[wrong]
    with pytest.raises(error) as caught: call()
    assert type(caught.value) is error
    for word in words: assert word in str(caught.value)
