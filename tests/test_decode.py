"""`fused_recurrent_kda` without gradients: one launch, states in place, in rows, in both layouts; against the recurrence.

Without a GPU the interpreter runs the kernel in float32. With one also half precision, launches, waits and CUDA graphs are checked.
"""
import pytest
import torch

from conftest import DEVICE, Backend, poisoned
from helpers import NAMES, borders, distance, draw, recurrence, recurrence_packed
from kda_lit import fused_recurrent_kda, use_backend
from test_fused import resolved

pytest.importorskip("triton")
import kda_lit.kernels as kernels  # noqa: E402

GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
OPTION = dict(unit="use_qk_l2norm_in_kernel", gated="use_gate_in_kernel", raw_beta="use_beta_sigmoid_in_kernel",
              doubled="allow_neg_eigval")


@pytest.fixture(params=[("torch", torch.float32)] + [("triton", d) for d in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def backend(request):
    yield from poisoned(Backend(*request.param))


@pytest.fixture
def launches(monkeypatch):
    "Kernels that are started, by name."
    started, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda f, *a, **k: started.append(f.__name__) or launch(f, *a, **k))
    return started


def put(backend, x):
    "Inputs as they arrive in the backend, states in float32; and the same numbers in float64."
    here = {name: t if t is None else t.to(DEVICE, torch.float32 if name == "initial_state" else backend.dtype)
            for name, t in x.items()}
    return here, {name: t if t is None else t.double().cpu() for name, t in here.items()}


def check(backend, x, cu_seqlens=None, scale=None, tol=None, **options):
    "Outputs and final states of one call; `options` as in `resolved`."
    here, wide = put(backend, x)
    options = {name: t.float() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    on_device = lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) else t
    flags = {OPTION.get(name, name): on_device(t) for name, t in options.items()}
    with use_backend(backend.name):
        o, S = fused_recurrent_kda(**here, scale=scale, output_final_state=True, cu_seqlens=on_device(cu_seqlens), **flags)
    want = recurred(wide, cu_seqlens, scale, **options)
    assert o.dtype == backend.dtype and S.dtype == torch.float32
    assert distance(S.cpu(), want[1]) <= (tol or 5e-6)
    assert distance(o.cpu(), want[0]) <= (tol or 5e-6) + (backend.eps if backend.dtype != torch.float32 else 0)


def recurred(x, cu_seqlens=None, scale=None, **options):
    "The definition, in float64."
    x = resolved(x, **{name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()})
    if x["initial_state"] is None:
        N = len(x["v"]) if cu_seqlens is None else len(cu_seqlens) - 1
        x["initial_state"] = torch.zeros(N, *x["v"].shape[2:3], x["k"].shape[3], x["v"].shape[3]).double()
    return recurrence(x, scale=scale) if cu_seqlens is None else recurrence_packed(x, cu_seqlens, scale=scale)


# ---- the numbers

@pytest.mark.parametrize("T", [0, 1, 2, 5])
@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (96, 60), (32, 256), (256, 32), (7, 1)])
def test_sizes(backend, T, K, V): check(backend, draw(2, T, H=1, HV=2, K=K, V=V))


@pytest.mark.parametrize("options", [
    dict(), dict(unit=True), dict(raw_beta=True), dict(raw_beta=True, doubled=True), dict(scale=1.0),
    dict(gated=True, A_log=torch.tensor([0.5, -1.])), dict(gated=True, A_log=torch.tensor([3., 0.]), dt_bias=torch.linspace(-3, 25, 32)),
    dict(gated=True, lower_bound=-5.0), dict(gated=True, lower_bound=-3.0, A_log=torch.ones(2), dt_bias=torch.ones(32))], ids=str)
def test_options(backend, options, launches):
    x = draw(3, 2, H=1, HV=2, K=16, V=20)
    if "gated" in options: x["g"] = 4 * torch.randn_like(x["g"])
    if "raw_beta" in options: x["beta"] = 3 * torch.randn_like(x["beta"])
    x["q"], x["k"] = 3 * x["q"], (2 if "unit" in options else 1) * x["k"]
    check(backend, x, **options)
    if backend.name == "triton": assert launches == ["decode_kernel"]


@pytest.mark.parametrize("decay", [0.0, -1.0, -80.0, -500.0, None])
def test_decays(backend, decay):
    x = draw(1, 5, K=16, V=16, decay=decay)
    if decay is None: x["g"] = torch.tensor([0.0, -0.01, -1, -80, -500]).double()[torch.randint(5, x["g"].shape)]
    check(backend, x)


def test_duplicate_keys(backend):
    "Written with full strength, again and again; and beta = 2, which mirrors."
    x = draw(1, 6, K=32, V=16, decay=0.0)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).clone()
    x["beta"].fill_(1)
    check(backend, x)
    check(backend, x | dict(beta=2 * x["beta"]), tol=2e-5 if backend.dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("lens", [[1, 1, 1], [2, 0, 5, 1], [0]], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_packed(backend, lens, state):
    x = draw(1, sum(lens), H=2, HV=4, K=16, V=20, N=len(lens))
    if not state: x["initial_state"] = None
    check(backend, x, borders(lens), unit=True)


def test_no_sequences(backend):
    here, _ = put(backend, draw(1, 0, K=16, V=20, N=0))
    with use_backend(backend.name):
        o, S = fused_recurrent_kda(**here, output_final_state=True, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    assert o.shape == (1, 0, 2, 20) and S.shape == (0, 2, 16, 20)


def test_no_state_is_made_unless_asked(backend):
    here, wide = put(backend, draw(2, 3, K=16, V=16) | dict(initial_state=None))
    with use_backend(backend.name): o, S = fused_recurrent_kda(**here)
    assert S is None and distance(o.cpu(), recurred(wide)[0]) <= 5e-6 + backend.eps


def test_parts_of_larger_tensors(backend, launches):
    "q, k, v and beta cut out of one projection: read where they are. Anything else is copied, and gives the same."
    x = draw(3, 2, H=2, HV=2, K=16, V=16)
    whole = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2), x["beta"]], -1).to(DEVICE, backend.dtype)
    q, k, v, beta = whole.split([32, 32, 32, 2], -1)
    here, wide = put(backend, x)
    here |= dict(q=q.unflatten(-1, (2, 16)), k=k.unflatten(-1, (2, 16)), v=v.unflatten(-1, (2, 16)), beta=beta)
    want = recurred(wide)
    for name in NAMES: assert kernels.even_tokens(here[name])[0] is here[name]
    turned = here | {name: here[name].transpose(0, 1).contiguous().transpose(0, 1) for name in NAMES}
    spread = here | {name: torch.stack([here[name]] * 2, -1)[..., 0] for name in NAMES}
    for x in (here, turned, spread, here | dict(initial_state=here["initial_state"].mT.contiguous().mT)):
        with use_backend(backend.name): o, S = fused_recurrent_kda(**x, output_final_state=True)
        assert distance(o.cpu(), want[0]) <= 5e-6 + backend.eps and distance(S.cpu(), want[1]) <= 5e-6


# ---- states in place, and in rows

@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lens", [None, [2, 0, 1]], ids=["batch", "packed"])
def test_in_place(backend, v_first, lens, launches):
    x = draw(*((3, 2) if lens is None else (1, 3)), K=16, V=20, N=3)
    here, wide = put(backend, x)
    S = here.pop("initial_state")
    if v_first: S = S.mT.contiguous()
    at, cu_seqlens = S.data_ptr(), None if lens is None else borders(lens)
    packed = dict(cu_seqlens=None if lens is None else cu_seqlens.to(DEVICE))
    with use_backend(backend.name):
        o, final = fused_recurrent_kda(**here, **packed, initial_state=S, output_final_state=True, state_v_first=v_first,
                                       inplace_final_state=True)
    want, want_S = recurred(wide, cu_seqlens)
    assert final.data_ptr() == at and torch.equal(final, S)
    assert distance((S.mT if v_first else S).cpu(), want_S) <= 5e-6 and distance(o.cpu(), want) <= 5e-6 + backend.eps
    if backend.name == "triton": assert launches == ["decode_kernel"]


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lens", [None, [2, 3, 0, 1]], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows(backend, v_first, lens, dtype):
    "Some sequences have no row: nothing of them is read, their outputs are 0. Rows that nobody names stay as they are."
    x = draw(*((4, 2) if lens is None else (1, 6)), K=16, V=20, N=4)
    rows = torch.tensor([5, -1, 0, -3], dtype=dtype)
    idle = (rows < 0)[:, None].expand(4, 2) if lens is None else (rows < 0).repeat_interleave(torch.tensor(lens))[None]
    here, wide = put(backend, x)
    for name in NAMES: here[name][idle.to(DEVICE)] = float("nan")
    pool = torch.randn(7, 2, *((20, 16) if v_first else (16, 20)), device=DEVICE)
    here["initial_state"], before = pool, pool.clone()
    seen = (before.mT if v_first else before).double().cpu()
    wide["initial_state"] = seen[rows.clamp(min=0).long()]
    packed = dict(cu_seqlens=None if lens is None else borders(lens).to(DEVICE))
    with use_backend(backend.name):
        o, S = fused_recurrent_kda(**here, **packed, state_v_first=v_first, inplace_final_state=True, output_final_state=True,
                                   ssm_state_indices=rows.to(DEVICE))
    want, want_S = recurred(wide, None if lens is None else borders(lens))
    want[idle], final = 0, seen.clone()
    final[rows[rows >= 0].long()] = want_S[rows >= 0]
    assert S.data_ptr() == pool.data_ptr() and not o[idle.to(DEVICE)].any()
    assert distance(o.cpu(), want) <= 5e-6 + backend.eps
    assert distance((pool.mT if v_first else pool).cpu(), final) <= 5e-6
    assert torch.equal(pool[[1, 2, 3, 4, 6]], before[[1, 2, 3, 4, 6]])


def test_rows_of_a_page(backend):
    "States that share their rows with something else, and states that do not lie in one piece."
    here, wide = put(backend, draw(2, 1, K=16, V=20))
    pages = torch.randn(2, 2 * 16 * 20 + 9, device=DEVICE)
    page = pages[:, 5:-4].unflatten(1, (2, 16, 20)).copy_(here["initial_state"])
    spread = torch.stack([here["initial_state"]] * 2, -1)[..., 0]
    around, (want, want_S) = pages[:, :5].clone(), recurred(wide)
    for S in (page, spread):
        with use_backend(backend.name): o, _ = fused_recurrent_kda(**here | dict(initial_state=S), inplace_final_state=True)
        assert distance(o.cpu(), want) <= 5e-6 + backend.eps and distance(S.cpu(), want_S) <= 5e-6
    assert torch.equal(pages[:, :5], around)


@pytest.mark.parametrize("rows", [None, torch.tensor([2, -1, 0])], ids=["own", "rows"])
def test_in_place_under_a_compiler(rows):
    "In one graph, unless there are rows."
    x = draw(3, 1, K=8, V=6, dtype=torch.float32)
    S = x.pop("initial_state")
    S = S, S.clone()
    f = lambda S: fused_recurrent_kda(**x, initial_state=S, inplace_final_state=True, ssm_state_indices=rows)[0]
    with use_backend("torch"): got, want = torch.compile(f, backend="eager", fullgraph=rows is None)(S[0]), f(S[1])
    torch._dynamo.reset()
    assert distance(got, want) < 1e-6 and distance(S[0], S[1]) < 1e-6


# ---- errors

X = draw(2, 1, K=8, V=6, dtype=torch.float32)
IN_PLACE = dict(inplace_final_state=True)


def rows(*numbers, dtype=torch.int64): return dict(IN_PLACE, ssm_state_indices=torch.tensor(numbers, dtype=dtype))


@pytest.mark.parametrize("change, error, words", [
    (dict(IN_PLACE, initial_state=None), ValueError, "`initial_state` must be given"),
    (dict(IN_PLACE, initial_state=X["initial_state"].half()), TypeError, "`initial_state` must be torch.float32"),
    (dict(IN_PLACE, q=X["q"].double()), TypeError, "`initial_state` must be torch.float64"),
    (dict(IN_PLACE, v=X["v"].clone().requires_grad_()), ValueError, "`inplace_final_state` must be False where a gradient"),
    (dict(ssm_state_indices=torch.tensor([0, 1])), ValueError, "`inplace_final_state` must be True"),
    (rows(0), ValueError, r"`ssm_state_indices` must be of shape \[N\] = \[2\], got \[1\]"),
    (rows(0, 1, dtype=torch.float32), TypeError, "`ssm_state_indices` must be an int32 or int64 tensor, got torch.float32"),
    (dict(IN_PLACE, ssm_state_indices=[0, 1]), TypeError, "`ssm_state_indices` must be an int32 or int64 tensor, got list"),
    (rows(0, 2), ValueError, "`ssm_state_indices` must be below the 2 rows, got 2"),
    (rows(1, 1), ValueError, r"`ssm_state_indices` must be different rows, or negative, got \[1, 1\]"),
    (dict(rows(0, 1), initial_state=X["initial_state"][:, :1]), ValueError, r"`initial_state` must be of shape \[rows, HV, K, V\]"),
], ids=str)
def test_errors(change, error, words):
    before = X["initial_state"].clone()
    with pytest.raises(error, match=words): fused_recurrent_kda(**X | change)
    assert torch.equal(before, X["initial_state"])


# ---- what a GPU does

def serving(N=3, H=4, D=64, T=1):
    "A pool of states, and a call that serves N sequences from it."
    new = lambda *size: torch.randn(size, device="cuda", dtype=torch.bfloat16)
    x = dict(q=new(N, T, H, D), k=new(N, T, H, D), v=new(N, T, H, D), g=new(N, T, H, D), beta=new(N, T, H),
             initial_state=torch.randn(N + 2, H, D, D, device="cuda"), A_log=torch.rand(H, device="cuda"),
             dt_bias=torch.rand(H * D, device="cuda"), ssm_state_indices=torch.arange(N, device="cuda") + 1)
    return x, lambda: fused_recurrent_kda(**x, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                                          use_beta_sigmoid_in_kernel=True, inplace_final_state=True)[0]


@GPU
def test_one_launch_and_no_wait():
    "Whether states are overwritten or made, packed or not."
    x, call = serving()
    packed = {name: x[name].transpose(0, 1) for name in NAMES} | dict(cu_seqlens=torch.arange(4, device="cuda"))
    plain = {name: x[name] for name in NAMES}
    for f in (call, lambda: fused_recurrent_kda(**plain, output_final_state=True), lambda: fused_recurrent_kda(**packed)):
        f(), torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen: f(), torch.cuda.synchronize()
        on_gpu = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert on_gpu == ["decode_kernel"]
        torch.cuda.set_sync_debug_mode("error")
        try: f()
        finally: torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("T", [1, 3])
def test_graph_replays_what_eager_does(T):
    "The inputs change between replays, rows too; states go on from where they are."
    x, call = serving(T=T)
    call(), torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): o = call()
    y, eager = serving(T=T)
    y["initial_state"].copy_(x["initial_state"])
    for rows in ([1, 2, 3], [3, -1, 0], [-1, -1, 4]):
        for name in (*NAMES, "A_log", "dt_bias"): x[name].copy_(torch.randn_like(x[name]))
        x["ssm_state_indices"].copy_(torch.tensor(rows))
        for name in (*NAMES, "A_log", "dt_bias", "ssm_state_indices"): y[name].copy_(x[name])
        graph.replay()
        assert torch.equal(o, eager()) and torch.equal(x["initial_state"], y["initial_state"])


@GPU
def test_borders_and_rows_outside_touch_nothing():
    "Nobody looks at the values, so the kernel has to stay inside."
    x, _ = serving(N=1, T=4)
    plain = {name: x[name] for name in NAMES}
    for cu in ([0, 4000], [-9, 4], [5, 9], [3, 1]):
        fused_recurrent_kda(**plain, cu_seqlens=torch.tensor(cu, device="cuda"))
    pool = x["initial_state"].clone()
    fused_recurrent_kda(**plain, initial_state=pool, ssm_state_indices=torch.tensor([99], device="cuda"), inplace_final_state=True)
    torch.cuda.synchronize()
    assert torch.equal(pool, x["initial_state"])
