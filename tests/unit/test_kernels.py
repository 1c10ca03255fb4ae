"""Triton kernels against the torch code that they replace: on a GPU compiled, without one in Triton's interpreter.

`make check` installs Triton and sets TOKPRUNE_TEST_KERNELS=1, with which a missing Triton is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings

import golden_harness
import pytest
import torch
import torch.nn.functional as F

import tokprune
from tokprune.core import attention, errors, kernels
from tokprune.core.layout import grid_layout
from tokprune.core.tokens import VisualTokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
REQUIRED = sys.platform == "linux" and "TOKPRUNE_TEST_KERNELS" in os.environ
needs_triton = pytest.mark.skipif(not HAS_TRITON and not REQUIRED, reason="pip install -c constraints.txt triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(n: int, width: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tied(n: int) -> torch.Tensor:
    """Unit vectors and their opposites: most distances are equal."""
    return torch.cat([torch.eye(8), -torch.eye(8)]).repeat(n // 16 + 1, 1)[:n].expand(3, -1, -1).to(DEVICE)


def padded(n: int) -> torch.Tensor:
    """The last rows are zeros."""
    x = draw(n, 16)
    x[:, n - n // 4 :] = 0
    return x


FEATURES = {
    "random": lambda n: draw(n, 24),
    "tied": tied,
    "duplicate": lambda n: draw(max(1, n // 3), 24).repeat(1, 4, 1)[:, :n],
    "padded": padded,
    "equal": lambda n: torch.ones(3, n, 8, device=DEVICE),
    "strided": lambda n: draw(2 * n, 48)[:, ::2, ::2],
}
SIZES = [(1, 1), (2, 2), (5, 3), (20, 20), (100, 14), (257, 9), (600, 9)]


def order_of(name: str, features: torch.Tensor, n_keep: int) -> torch.Tensor:
    """Of `divprune` or `cdpruner`."""
    method = tokprune.get_method(name)
    if name == "divprune":
        return method.order(VisualTokens.of(features, grid_layout(1, features.shape[1])), n_keep)
    relevance = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(2)).to(features.device)
    return method.order(features, (relevance * 16).round() / 16, n_keep)  # of which some are equal


SMALL = ("N256_K26_2", "N625_K62_4", "B2_N144_D64_T24_2")  # golden cases


# ---- greedy selection


@needs_triton
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize(("n", "n_keep"), SIZES)
@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_greedy_order_is_that_of_torch(name, n, n_keep, kind):
    features = FEATURES[kind](n)
    with kernels.use("off"):
        want = order_of(name, features, n_keep)
    with kernels.use("always"):
        got = order_of(name, features, n_keep)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_greedy_order_of_every_dtype_and_batch(name, batch, dtype):
    features = draw(77, 24, batch).to(dtype)
    with kernels.use("off"):
        want = order_of(name, features, 30)
    with kernels.use("always"):
        assert torch.equal(order_of(name, features, 30), want)


@needs_triton
def test_farthest_by_hand():
    x = draw(40, 6)
    distance = 1 - F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
    first = torch.tensor([3, 0, 39], device=DEVICE)
    with kernels.use("always"):
        got = kernels.farthest(distance, first, 12)
    for image in range(3):
        chosen = [int(first[image])]
        while len(chosen) < 12:
            left = [i for i in range(40) if i not in chosen]
            chosen.append(max(left, key=lambda i: float(distance[image, chosen, i].min())))  # the first of equals
        assert got[image].tolist() == chosen


@needs_triton
def test_determinant_by_hand():
    """Every choice is the one with which the determinant of the chosen rows and columns is largest."""
    scaled = F.normalize(draw(24, 32), dim=-1) * torch.linspace(0.5, 1, 24, device=DEVICE)[:, None]
    kernel = scaled @ scaled.transpose(1, 2)
    with kernels.use("always"):
        got = kernels.determinant(kernel, torch.ones_like(kernel[:, 0]), 10, 1e-6)
    for image in range(3):
        chosen: list[int] = []
        for _ in range(10):
            left = [i for i in range(24) if i not in chosen]
            size = {i: float(kernel[image].double()[[*chosen, i]][:, [*chosen, i]].det()) for i in left}
            chosen.append(max(left, key=lambda i: size[i]))
        assert got[image].tolist() == chosen


@needs_triton
def test_exhausted_residuals_leave_the_rest_to_relevance():
    features = torch.eye(4)[[0, 1] * 10][None].to(DEVICE)
    relevance = torch.linspace(0.1, 1, 20, device=DEVICE)[None]
    with kernels.use("always"):
        order = tokprune.get_method("cdpruner").order(features, relevance, 6)[0].tolist()
    assert order == [19, 18, 17, 16, 15, 14]


@needs_triton
@pytest.mark.parametrize(
    "case",
    [c for c in golden_harness.cases(golden_harness.FOLDERS[0]) if c.label in SMALL],
    ids=lambda case: f"{case.method}-{case.label}",
)  # fmt: skip
def test_kernels_agree_with_the_golden_data(case):
    with kernels.use("always"):
        golden_harness.CHECKS[case.method](case)


# ---- attention received


@needs_triton
@pytest.mark.parametrize("special", ["keys", "none", "both"])
@pytest.mark.parametrize("n_special", [0, 1, 5])
def test_attention_received_is_that_of_torch_and_of_the_map(n_special, special):
    q, k = (draw(75, 2 * 24, 2, seed).unflatten(2, (2, 24)).transpose(1, 2) for seed in (0, 1))
    with kernels.use("off"):
        want = attention.received_and_given(3 * q, k, 0.2, "softmax", n_special, special)
    with kernels.use("always"):
        got = attention.received_and_given(3 * q, k, 0.2, "softmax", n_special, special)
        alone = attention.received(3 * q, k, 0.2, "softmax", n_special, special)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert torch.equal(alone, got[0])
    first = n_special if special == "none" else 0
    rows = (3 * q.double() @ k.double().transpose(-1, -2)[..., first:] * 0.2).softmax(-1)[..., n_special - first :]
    queries = rows if special == "both" else rows[:, :, n_special:]
    torch.testing.assert_close(got[0].double(), queries.mean((1, 2)), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[1].double(), rows[:, :, n_special:].mean((1, 3)), rtol=1e-5, atol=1e-8)


@needs_triton
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "width", "batch"), [(1, 8, 1), (16, 64, 3), (65, 72, 1), (130, 80, 1)])
def test_attention_received_of_every_dtype_and_width(n, width, batch, dtype):
    q, k = (draw(n, 2 * width, batch, seed).unflatten(2, (2, width)).transpose(1, 2).to(dtype) for seed in (0, 1))
    with kernels.use("off"):
        want = attention.received(q, k, width**-0.5)
    with kernels.use("always"):
        got = attention.received(q, k, width**-0.5)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-8)


@needs_triton
def test_attention_of_one_wide_head():
    q, k = (draw(33, 3 * 70, 2, seed).unflatten(2, (3, 70)).transpose(1, 2) for seed in (0, 1))
    arguments = attention.as_one_head(q, k)
    with kernels.use("off"):
        want = attention.received(*arguments)
    with kernels.use("always"):
        torch.testing.assert_close(attention.received(*arguments), want, rtol=1e-5, atol=1e-8)


@needs_triton
def test_large_logits_stay_finite():
    q, k = (80 * draw(40, 16, 1, seed)[:, None] for seed in (0, 1))
    with kernels.use("off"):
        want = attention.received(q, k, 1.0)
    with kernels.use("always"):
        got = attention.received(q, k, 1.0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


# ---- who uses them, and what happens where one fails


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels were asked for, and CPU tensors count as CUDA tensors; what has failed is forgotten afterwards."""
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    monkeypatch.setattr(kernels, "_fits", lambda x: True)
    monkeypatch.setattr(kernels, "_FAILED", set())
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())  # any context


def refuse(error: Exception):
    def kernel(*arguments):
        calls.append(arguments)
        raise error

    calls: list[tuple] = []
    return kernel, calls


def test_a_kernel_that_fails_is_left_out_with_one_warning(as_on_a_gpu, monkeypatch):
    kernel, calls = refuse(RuntimeError("no compiler found\nand more"))
    monkeypatch.setattr(kernels, "_kernel", lambda module, name: kernel)
    features = draw(20, 8).cpu()
    with kernels.use("off"):
        want = order_of("divprune", features, 7)
    with pytest.warns(UserWarning, match=r"'farthest' failed.*no compiler found\. Set TOKPRUNE_KERNELS=off"):
        assert torch.equal(order_of("divprune", features, 7), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(order_of("divprune", features, 7), want)
    assert len(calls) == 1
    with pytest.warns(UserWarning, match="'determinant' failed"):  # each kernel for itself
        order_of("cdpruner", features, 7)


def test_no_memory_is_no_failure_of_a_kernel(as_on_a_gpu, monkeypatch):
    kernel, _ = refuse(torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(kernels, "_kernel", lambda module, name: kernel)
    with pytest.raises(torch.OutOfMemoryError):
        order_of("divprune", draw(20, 8).cpu(), 7)
    assert not kernels._FAILED


def test_where_kernels_always_run_a_failure_is_seen(monkeypatch):
    kernel, _ = refuse(RuntimeError("no compiler"))
    monkeypatch.setattr(kernels, "_kernel", lambda module, name: kernel)
    with kernels.use("always"), pytest.raises(RuntimeError, match="no compiler"):
        order_of("divprune", draw(20, 8), 7)


@needs_triton
def test_on_a_gpu_a_kernel_runs_where_it_was_asked_for(as_on_a_gpu, monkeypatch):
    ran = []
    found = kernels._kernel
    monkeypatch.setattr(kernels, "_kernel", lambda module, name: ran.append(name) or found(module, name))
    order_of("divprune", draw(20, 8), 7)
    order_of("cdpruner", draw(20, 8), 7)
    attention.received(*(draw(20, 8)[:, None] for _ in range(2)), 1.0)
    assert ran == ["farthest", "determinant", "column_sums"]
    assert not kernels._FAILED


@pytest.mark.parametrize("how", ["nothing", "variable", "with"])
def test_kernels_are_off_until_they_are_asked_for(as_on_a_gpu, monkeypatch, how):
    kernel, calls = refuse(RuntimeError("not to be called"))
    monkeypatch.setattr(kernels, "_kernel", lambda module, name: kernel)
    if how != "with":
        monkeypatch.setenv(kernels.VARIABLE, "off" if how == "variable" else "")
        order_of("divprune", draw(20, 8).cpu(), 7)
    else:
        with kernels.use("off"):
            order_of("divprune", draw(20, 8).cpu(), 7)
    assert not calls


def test_a_wrong_setting_is_refused(monkeypatch):
    with pytest.raises(errors.OptionError, match="'of': use off, auto, always"):
        with kernels.use("of"):
            pass
    monkeypatch.setenv(kernels.VARIABLE, "never")
    with pytest.raises(errors.OptionError, match="TOKPRUNE_KERNELS 'never'"):
        kernels.setting()
    monkeypatch.setenv(kernels.VARIABLE, "")
    assert kernels.setting() == "off"


def test_the_setting_before_comes_back():
    with pytest.raises(ZeroDivisionError):
        with kernels.use("always"):
            with kernels.use("auto"):
                assert kernels.setting() == "auto"
            assert kernels.setting() == "always"
            raise ZeroDivisionError
    assert kernels.setting() == "off"


def test_a_cpu_never_imports_triton():
    code = (
        "import sys, torch, tokprune; from tokprune.core.layout import grid_layout; "
        "from tokprune.prune import Picture; before = 'triton' in sys.modules; "
        "tokprune.select([Picture(torch.randn(36, 8), grid_layout(6, 6))], 'divprune', keep_tokens=9); "
        "assert not before and 'triton' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_triton
def test_pictures_too_large_for_a_block_are_left_to_torch():
    from tokprune.core.kernels import greedy

    small = torch.zeros(1, 1, device=DEVICE)
    assert greedy.determinant(small.expand(1, 4097, 4097), small.expand(1, 4097), 2, 1e-6) is None
    assert greedy.determinant(small.expand(1, 4096, 4096), small.expand(1, 4096), 513, 1e-6) is None
    assert greedy.farthest(small.expand(1, 16385, 16385), small.long()[0], 2) is None


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from tokprune.core.kernels import attention, greedy

def compiled(function, types, fixed, warps):
    types = {**types, **dict.fromkeys(fixed, "constexpr")}
    places = {(function.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=function, signature={name: types[name] for name in function.arg_names}, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    assert made.asm["cubin"]

numbers = {"n": "i32", "n_keep": "i32", "chosen": "*i64", "first": "*i64"}
numbers |= dict.fromkeys(("distance", "kernel", "relevance", "basis"), "*fp32")
for block in (64, 4096):
    compiled(greedy._farthest, numbers, {"BLOCK": block}, greedy._warps(block))
    compiled(greedy._determinant, numbers, {"LEAST": 1e-6, "BLOCK": block}, greedy._warps(block))
for dtype, tile in (("fp32", attention.EXACT_TILE), ("bf16", attention.TILE), ("fp16", attention.TILE)):
    for function in (attention._log_sum_exp, attention._columns):
        types = dict.fromkeys(function.arg_names, "i32")
        types |= {"q": f"*{dtype}", "k": f"*{dtype}", "lse": "*fp32", "sums": "*fp32", "scale": "fp32"}
        compiled(function, types, dict.fromkeys(("ROWS", "COLUMNS", "WIDTH"), tile), 4)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("target", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_here(target, tmp_path):
    """The interpreter takes more than the compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", COMPILE, str(target)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
