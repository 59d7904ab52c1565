"""What several test files need: golden cases, random inputs, a distance, gradients."""
import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from kda_lit import naive_recurrent_kda

GOLDEN = Path(__file__).parent / "data" / "kda_reference.safetensors"
NAMES = ("q", "k", "v", "g", "beta")


@lru_cache
def golden(case):
    "Tensors and settings of one case, by name."
    mine = lambda keys: [key for key in keys if key.startswith(case + "/")]
    short = lambda key: key.removeprefix(case + "/")
    with safe_open(GOLDEN, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return {**{short(key): meta[key] for key in mine(meta)},
                **{short(key): file.get_tensor(key) for key in mine(file.keys())}}


def state_dict(case):
    "The parameters that a golden case was recorded with."
    start = "state_dict."
    return {key.removeprefix(start): x for key, x in golden(case).items() if key.startswith(start)}


def draw(B, T, H=2, K=16, V=16, HV=None, *, N=None, decay=None, dtype=torch.float64, seed=0):
    "Unit keys and queries, decays in (-1, 0) or `decay` itself, strengths in (0, 1), N initial states."
    HV, N, random = HV or H, B if N is None else N, torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=random, dtype=torch.float64)
    x = dict(q=F.normalize(normal(B, T, H, K), dim=-1), k=F.normalize(normal(B, T, H, K), dim=-1),
             v=normal(B, T, HV, V), g=-uniform(B, T, HV, K), beta=uniform(B, T, HV),
             initial_state=normal(N, HV, K, V))
    if decay is not None: x["g"] = torch.as_tensor(decay, dtype=torch.float64).expand_as(x["g"]).clone()
    return cast(x, dtype)


def cast(x, dtype):
    "All tensors of a dictionary in another dtype."
    return {name: t.to(dtype) for name, t in x.items()}


def borders(lens):
    "cu_seqlens of sequences this long."
    return F.pad(torch.tensor(lens, dtype=torch.long).cumsum(0), (1, 0))


def distance(got, want):
    "Largest difference relative to the largest entry of `want`; infinite if anything is not finite."
    assert got.shape == want.shape, f"{list(got.shape)} is not {list(want.shape)}"
    if want.numel() == 0: return 0.0
    got, want = got.detach().double(), want.detach().double()
    if not got.isfinite().all(): return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def recurrence(x, dtype=torch.float64, **options):
    "The definition of KDA, token by token, on a dictionary of inputs."
    return naive_recurrent_kda(**cast(x, dtype), output_final_state=True, **options)


def recurrence_packed(x, cu_seqlens, **options):
    "The definition, each packed sequence for itself."
    outputs, states = [], []
    for n, (a, b) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist())):
        one = {name: x[name][:, a:b] for name in NAMES}
        o, S = recurrence({**one, "initial_state": x["initial_state"][n:n + 1]}, **options)
        outputs.append(o), states.append(S)
    return torch.cat(outputs, 1), torch.cat(states)


def gradients(op, x, do, dS, **options):
    "Gradients of (o · do).sum() + (S · dS).sum() with respect to every input of `x`."
    x = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    o, S = op(**x, output_final_state=True, **options)
    loss = (o * do).sum() + (S * dS).sum()
    return dict(zip(x, torch.autograd.grad(loss, list(x.values()))))
