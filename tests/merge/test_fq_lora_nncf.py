"""`fq_lora` against NNCF's own strip: single quantisers of every kind, a large layer, and whole models."""

from __future__ import annotations

import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from nncf_models import (
    assert_same,
    grid_of,
    nncf_with_strip,
    numpy_of,
    set_ranks,
    stripped_layers,
    tuned,
)
from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.nncf_fq import NncfCheckpoint
from sparseport.merge import fq_lora
from sparseport.merge.delta import low_rank_product
from sparseport.merge.fq_lora import merge_fq_lora
from sparseport.weights.fake_quantizer import FakeQuantizer
from sparseport.weights.linear import DenseWeight, LowRankBranch

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]


def none(rows, columns):
    """An adapter that changes nothing."""
    return {"a": np.zeros((1, columns), BF16), "b": np.zeros((rows, 1), BF16)}


def merged(values, quantizer, rank=None):
    return merge_fq_lora(DenseWeight(values), quantizer, rank, "layer")


@pytest.fixture(scope="module")
def nncf():
    with nncf_with_strip() as package:
        yield package


def torch_of(array):
    import torch

    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == BF16 else torch.from_numpy(array)
    )


def nncf_quantizer(quantizer, rank=None):
    """The NNCF module that holds the same numbers, with the rank set as NNCF's example sets it."""
    import torch
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization import layers

    shape = next(iter(quantizer.ranges.values())).shape
    name = ("Symmetric" if quantizer.symmetric else "Asymmetric") + ("LoraNLS" if quantizer.rank else "") + "Quantizer"
    scale_shape = (*shape, 1) if quantizer.rank else shape
    spec = layers.PTQuantizerSpec(quantizer.bits, QuantizationScheme.SYMMETRIC, True, False, False, scale_shape, False)
    specs = [spec]
    if quantizer.rank:
        whole = [quantizer.rows, quantizer.a.shape[1]]
        specs.append(layers.PTLoraNLSSpec(quantizer.rank, quantizer.rank, whole, [*shape, whole[1] // shape[1]]))
    module = getattr(layers, name)(*specs)
    named = {**quantizer.ranges, **({"lora_A": quantizer.a, "lora_B": quantizer.b} if quantizer.rank else {})}
    for key, array in named.items():
        array = array.reshape(scale_shape) if key in quantizer.ranges else array
        setattr(module, key, torch.nn.Parameter(torch_of(array.copy())))
    if rank:
        module.set_active_rank(rank)
    return module


def stripped(values, quantizer, rank=None):
    """NNCF's levels, zero-points and scales for a weight, with its sign convention."""
    import torch
    from nncf.torch.quantization import strip

    convert = strip.sym_fq_to_decompressor if quantizer.symmetric else strip.asym_fq_to_decompressor
    with torch.no_grad():
        decompressor, levels = convert(nncf_quantizer(quantizer, rank), torch_of(values))
    return levels.numpy().reshape(values.shape), *grid_of(decompressor)


def random_layer(seed, rows, columns, group, *, symmetric, bits=4, rank=8, dtype=np.float32):
    """A half-pruned weight and a quantiser whose range was moved by training; some groups have odd ranges.

    The adapter's sums are exact in float32, so that their order, which is the machine's choice, changes nothing; its
    product is not exact in bfloat16.
    """
    random = np.random.default_rng(seed)
    values = (random.normal(size=(rows, columns)) * 0.1 * (random.random((rows, columns)) < 0.5)).astype(dtype)
    groups = values.astype(np.float32).reshape(rows, -1, group)
    low, high = (groups.min(axis=2), groups.max(axis=2))
    low, high = ((end * random.uniform(0.8, 1.1, end.shape)).astype(np.float32) for end in (low, high))
    ranges = {"input_low": low, "input_range": high - low}
    ranges["input_range"][1::3] *= -1
    low[0], low[1] = 0.1, 0
    if symmetric:
        size = np.maximum(high, -low)
        ranges = {"scale": np.where(random.random(size.shape) < 0.5, size, -size)}
        ranges["scale"][2], ranges["scale"][3] = 1e-20, -1e-9  # smaller than NNCF's two limits
        if dtype == np.float16 and not rank:
            ranges["scale"][2:4] = -0.2  # has no range in float16, and is refused
    adapter = {}
    if rank:
        adapter["a"] = (random.integers(-8, 9, (rank, columns)) / 64).astype(BF16)
        adapter["b"] = (random.integers(-8, 9, (rows, rank)) / 64).astype(BF16)
    return values, FakeQuantizer(bits, symmetric, group if rank else -1, **ranges, **adapter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_layer_is_what_nncf_strips(nncf, dtype, bits, symmetric):
    for seed, (rows, columns, group) in enumerate([(64, 128, 32), (96, 64, 64), (48, 96, 16)]):
        kind = {"symmetric": symmetric, "bits": bits, "dtype": dtype}
        values, quantizer = random_layer(seed, rows, columns, group, **kind)
        for rank in (None, 5, 1):
            weight = merged(values, quantizer, rank)
            assert_same(weight, *stripped(values, quantizer, rank), symmetric)
            assert len(np.unique(weight.codes)) > 12
            if symmetric:
                assert set(np.unique(weight.zero_points)) == {2 ** (bits - 1)} and (weight.scales < 0).any()
        values, quantizer = random_layer(seed, rows, columns, columns, rank=0, **kind)
        assert_same(merged(values, quantizer), *stripped(values, quantizer), symmetric)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_edges_are_decided_as_nncf_does(nncf, bits):
    """Weights in the middle between two steps, where the last bit of `number / tensor` decides: torch divides in two
    ways, one for quantisers with an adapter and one for those without."""
    random = np.random.default_rng(0)
    top = 2**bits - 1
    low = -random.uniform(0.3, 1, (200, 1)).astype(np.float32)
    width = -low * random.uniform(2, 4, low.shape).astype(np.float32)
    quantizer = FakeQuantizer(bits, False, -1, input_low=low, input_range=width)
    grid = merged(np.zeros((200, 1), np.float32), quantizer)
    edges = np.arange(top)[None, :] + 0.5 - grid.zero_points
    values = (edges * step_of(quantizer, top)).astype(np.float32)
    with_adapter = replace(quantizer, **none(200, top))
    ours, other = merged(values, quantizer), merged(values, with_adapter)
    assert_same(ours, *stripped(values, quantizer), False)
    assert_same(other, *stripped(values, with_adapter), False)
    assert (ours.codes != other.codes).mean() > 0.01


@pytest.mark.parametrize("top", [15, 255])
def test_the_range_is_aligned_as_nncf_does(nncf, top):
    """Bit for bit, also where zero lies in the middle between two steps, and where both ends may move."""
    from nncf.torch.quantization.quantize_functions import TuneRange

    random = np.random.default_rng(0)
    width = random.uniform(0.1, 4, (20_000, 1)).astype(np.float32)
    lows = [
        random.uniform(-5, 1, width.shape),
        -width * (random.integers(0, top, width.shape) + 0.5) / top,
        -width * random.integers(0, top + 1, width.shape) / top,
    ]
    for low in lows:
        low = low.astype(np.float32)
        ours = fq_lora._tune_range(low, width, top)
        theirs = TuneRange.apply(torch_of(low), torch_of(width), top + 1)
        for mine, other in zip(ours, theirs, strict=True):
            assert np.array_equal(mine, other.numpy())


def step_of(quantizer, top):
    """Steps [out, 1] in float32, from NNCF's own alignment of the range."""
    from nncf.torch.quantization.quantize_functions import TuneRange

    _, width = TuneRange.apply(torch_of(quantizer.input_low), torch_of(np.abs(quantizer.input_range)), top + 1)
    return width.numpy() / np.float32(top)


def test_a_large_layer_differs_by_sums_only(nncf):
    """576 x 1536 with any adapter: torch sums B A in another order, which moves a few elements in their last bit."""
    random = np.random.default_rng(0)
    values, quantizer = random_layer(1, 576, 1536, 64, symmetric=False, rank=32)
    a = (random.normal(size=(32, 1536)) * 0.05).astype(BF16)
    b = (random.normal(size=(576, 32)) * 0.05).astype(BF16)
    ours = low_rank_product(LowRankBranch(a, b, 1.0)).astype(BF16)
    theirs = numpy_of(torch_of(b) @ torch_of(a))
    different = ours != theirs
    assert different.sum() <= 200  # 17 of 884,736 where this was written
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    sums = np.abs(b.astype(np.float64)) @ np.abs(a.astype(np.float64))
    assert (gap <= 2.0**-7 * np.abs(ours.astype(np.float64)) + 2.0**-18 * sums).all()
    levels, zero_points, scales = stripped(values, replace(quantizer, a=a, b=b))
    weight = merged(values, replace(quantizer, a=a, b=b))
    assert np.array_equal(weight.zero_points, zero_points) and np.array_equal(weight.scales, scales)
    moved = np.abs(weight.codes.astype(int) - levels)
    assert moved.max() <= 1 and moved.sum() <= 5  # 0 where this was written
    assert not moved[~different].any()


@pytest.mark.slow
def test_the_compiled_extension_gives_the_same_codes(nncf, repo_root, monkeypatch):
    """An embedding of 2000 x 576 in INT8 through NNCF's extension as a C++ compiler builds it."""
    from nncf.torch.quantization import extensions, quantize_functions, reference

    if shutil.which("ninja") is None or shutil.which("g++") is None:
        pytest.skip("NNCF's extension needs g++ and ninja")
    build = repo_root / ".cache" / "torch_extensions"
    build.mkdir(parents=True, exist_ok=True)
    (repo_root / ".cache" / ".gitignore").write_text("*\n", encoding="utf-8")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(build))
    extension = extensions.QuantizedFunctionsCPULoader.load()
    if extension is extensions.ReferenceQuantizedFunctions:
        pytest.skip("NNCF's extension could not be compiled")

    def differing(forward):
        monkeypatch.setattr(quantize_functions, "QuantizedFunctionsCPU", {"Quantize_forward": forward})
        return int((stripped(values, quantizer)[0] != codes).sum())

    for dtype in DTYPES:
        values, quantizer = random_layer(2, 2000, 576, 576, symmetric=False, bits=8, rank=0, dtype=dtype)
        codes = merged(values, quantizer).codes
        assert differing(extension.Quantize_forward) == 0
        # Without a compiler NNCF is another quantiser: hardly in float32, visibly in 16 bits.
        other = differing(reference.torch_executor.forward)
        assert other <= 20 if dtype == np.float32 else other > codes.size // 1000


MODELS = [
    ("INT4_ASYM", "FQ_LORA_NLS", "float32", (None, 6, 4)),
    ("INT4_SYM", "FQ_LORA_NLS", "bfloat16", (None, 6, 4)),
    ("INT4_ASYM", "FQ_LORA", "bfloat16", (None,)),
    ("INT4_SYM", "FQ_LORA", "float32", (None,)),
]


@pytest.mark.parametrize(("mode", "compression", "dtype", "ranks"), MODELS, ids=lambda value: str(value))
def test_a_whole_model_is_what_nncf_strips(nncf, tiny_base, tmp_path, mode, compression, dtype, ranks):
    """Compress, tune (at random), save as in NNCF's examples, and merge: every layer, embedding and head included."""
    model = tuned(nncf, tiny_base, tmp_path, mode=mode, compression=compression, dtype=dtype)
    stored = BF16 if dtype == "bfloat16" else np.dtype(np.float32)
    with NncfCheckpoint.open(tmp_path, allow_pickle=True) as checkpoint, ModelFolder.open(tiny_base) as base:
        checkpoint.check_base(base)
        negative = 0
        for rank in ranks:
            if rank:
                set_ranks(model, rank)
            want = stripped_layers(nncf, model)
            assert set(want) == set(checkpoint.modules()) and len(want) == 16
            for module, (levels, zero_points, scales) in want.items():
                quantizer = checkpoint.quantizer(module)
                values = base.read(f"{module}.weight").astype(np.float32).astype(stored)
                weight = merged(values, quantizer, rank if module in checkpoint.elastic_ranks() else None)
                assert_same(weight, levels, zero_points, scales, quantizer.symmetric)
                negative += int((weight.scales < 0).sum())
        assert (negative > 100) == (mode == "INT4_SYM")  # scales below zero are the rule, not an exception
