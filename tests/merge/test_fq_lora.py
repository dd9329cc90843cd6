"""`fq_lora` against numbers worked out by hand, against NNCF's own strip, and its promises about zeros."""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparseport.checkpoints.folder import ModelFolder
from sparseport.checkpoints.nncf_fq import NncfCheckpoint
from sparseport.errors import BadInput, Unsupported
from sparseport.merge import fq_lora
from sparseport.merge.delta import low_rank_product
from sparseport.merge.fq_lora import merge_fq_lora
from sparseport.offline import go_offline
from sparseport.weights.fake_quantizer import FakeQuantizer
from sparseport.weights.linear import DenseWeight, LowRankBranch
from sparseport.weights.mask import mask_of
from sparseport.weights.rounding import dequantize

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]


def f32(*rows):
    return np.array(rows, np.float32)


def none(rows, columns):
    """An adapter that changes nothing."""
    return {"a": np.zeros((1, columns), BF16), "b": np.zeros((rows, 1), BF16)}


def asym(low, width, bits=4, group=-1, **adapter):
    return FakeQuantizer(bits, False, group, input_low=f32(*low), input_range=f32(*width), **adapter)


def sym(*scale, bits=4, group=-1, **adapter):
    return FakeQuantizer(bits, True, group, scale=f32(*scale), **adapter)


def merged(values, quantizer, rank=None):
    return merge_fq_lora(DenseWeight(values), quantizer, rank, "layer").weight


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_asymmetric_by_hand():
    """Range -1 .. 2.75 in 15 steps of 0.25; zero is the fourth. Ties go to an even distance from zero."""
    values = f32([-1.25, -1, -0.125, 0, 0.125, 0.25, 0.375, 2.75, 3])
    weight = merged(values, asym([[-1]], [[3.75]], **none(1, 9)))
    assert weight.codes.tolist() == [[0, 0, 4, 4, 4, 5, 6, 15, 15]]
    assert weight.zero_points.tolist() == [[4]] and weight.scales.tolist() == [[0.25]]
    assert weight.scales.dtype == np.float16 and (weight.bits, weight.group_size) == (4, 9)


def test_the_sign_of_a_range_has_no_meaning():
    for width in (3.75, -3.75):
        weight = merged(f32([-1, 0, 1, 2.75]), asym([[-1]], [[width]], **none(1, 4)))
        assert weight.codes.tolist() == [[0, 4, 8, 15]] and weight.scales.tolist() == [[0.25]]


@pytest.mark.parametrize(
    ("low", "width", "step", "zero"),
    [
        (-1.0, 3.9, Fraction(29, 110), 4),  # zero would be step 3.85: the lower end moves to -4/11 * 2.9
        (-1.1, 3.85, Fraction(11, 40), 4),  # zero would be step 4.29: the upper end moves to 11/4 * 1.1
        (0.5, 1.0, Fraction(1, 10), 0),  # starts above zero: becomes 0 .. 1.5
        (-2.0, 0.5, Fraction(2, 15), 15),  # ends below zero: becomes -2 .. 0
    ],
)
def test_the_range_moves_so_that_zero_is_a_step(low, width, step, zero):
    values = f32([float(step * k) for k in range(-zero, 16 - zero)])
    weight = merged(values, asym([[low]], [[width]], **none(1, 16)))
    assert weight.zero_points.tolist() == [[zero]]
    assert weight.scales.tolist() == [[float(np.float16(float(step)))]]
    assert weight.codes.tolist() == [list(range(16))]


def test_symmetric_by_hand():
    """Scale 2 is 8 steps of 0.25; only -2 has a code, +2 is clipped."""
    values = f32([-2.5, -2, -0.375, -0.125, 0, 0.125, 0.375, 1.75, 2])
    weight = merged(values, sym([2], **none(1, 9)))
    assert weight.codes.tolist() == [[0, 0, 6, 8, 8, 8, 10, 15, 15]]
    assert weight.zero_points.tolist() == [[8]] and weight.scales.tolist() == [[0.25]]


def test_negative_scale_by_hand():
    """Scale -2: +2 has a code, -2 is clipped. The group with +2 needs zero-point 7, the one without does not."""
    values = f32([2.5, 2, 1.75, 0.125, 0, -0.375, -1.75, -2] + [1.75, 1.5, 0.25, 0.125, 0, -0.375, -1.75, -2])
    weight = merged(values, sym([-2, -2], group=8, **none(1, 16)))
    assert weight.codes.tolist() == [[15, 15, 14, 7, 7, 5, 0, 0] + [15, 14, 9, 8, 8, 6, 1, 1]]
    assert weight.zero_points.tolist() == [[7, 8]] and weight.scales.tolist() == [[0.25, 0.25]]
    assert dequantize(weight).tolist() == [
        [2, 2, 1.75, 0, 0, -0.5, -1.75, -1.75] + [1.75, 1.5, 0.25, 0, 0, -0.5, -1.75, -1.75]
    ]


def test_the_adapter_is_added_without_scaling_and_sliced_by_rank():
    adapter = {"a": np.array([[1, 2, -1, 0], [0, 1, 1, 2]], BF16), "b": np.array([[0.25, 0.5]], BF16)}
    quantizer = asym([[-1]], [[3.75]], **adapter)
    base = f32([0, 0, 0, 0])
    assert merged(base, quantizer).codes.tolist() == [[5, 8, 5, 8]]
    assert merged(base, quantizer, 2).codes.tolist() == [[5, 8, 5, 8]]
    assert merged(base, quantizer, 1).codes.tolist() == [[5, 6, 3, 4]]


def test_eight_bits_by_row():
    """Steps of 1/64 from -1, and of 1/32 from 0; a symmetric row has scale 1 and counts 128 steps of 1/128."""
    weight = merged(f32([-1, 0, 0.5, 2], [0, 1, 2, 5]), asym([[-1], [0]], [[255 / 64], [255 / 32]], bits=8))
    assert weight.codes.tolist() == [[0, 64, 96, 192], [0, 32, 64, 160]]
    assert weight.zero_points.tolist() == [[64], [0]] and weight.scales.tolist() == [[1 / 64], [1 / 32]]
    assert (weight.bits, weight.group_size) == (8, 4)
    weight = merged(f32([-1, 0, 0.5, 2]), sym([1], bits=8, **none(1, 4)))
    assert weight.codes.tolist() == [[0, 128, 192, 255]] and weight.zero_points.tolist() == [[128]]


def test_a_row_without_range_keeps_a_scale():
    """NNCF's smallest step is 2**-23, which float16 still holds."""
    weight = merged(np.zeros((2, 4), np.float32), asym([[0], [0]], [[0], [-1e-16]], bits=8))
    assert weight.codes.tolist() == [[0] * 4] * 2 and weight.scales.tolist() == [[2.0**-23]] * 2


@pytest.mark.parametrize(
    ("base", "a", "b", "tie", "codes"),
    [
        # W + B A = 1 + 3 * 2**-10, which bfloat16 rounds to 1
        (1.0, 3 * 2.0**-10, 1.0, 1 + 2.0**-10, {"float32": 9, "float16": 9, "bfloat16": 8}),
        # W + B A = 1 + 2**-12, which float16 rounds to 1 as well
        (1.0, 2.0**-12, 1.0, 1 + 2.0**-13, {"float32": 9, "float16": 8, "bfloat16": 8}),
        # B A = 1 + 2**-6 + 2**-14 loses its last bit in bfloat16, before it is added
        (0.0, 1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-6 + 2.0**-15, {"float32": 8}),
    ],
)
def test_product_and_sum_are_rounded_to_their_dtypes(base, a, b, tie, codes):
    """`tie` is the middle between level 0 (code 8) and level 1 (code 9)."""
    quantizer = sym([16 * tie], a=np.array([[a]], BF16), b=np.array([[b]], BF16))
    for dtype, code in codes.items():
        assert merged(np.array([[base]], np.dtype(dtype)), quantizer).codes.tolist() == [[code]], dtype
    exact = replace(quantizer, a=f32([a]), b=f32([b]))
    assert merged(f32([base]), exact).codes.tolist() == [[9]]  # the product is computed in the adapter's dtype


# --- pruned weights --------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32)


@given(
    arrays.arrays(np.float32, (3, 8), elements=NUMBERS),
    arrays.arrays(np.bool_, (3, 8)),
    arrays.arrays(np.float32, (2, 3, 2), elements=NUMBERS),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_without_an_update_pruned_weights_stay_zero(values, mask, ranges, symmetric, dtype):
    base = DenseWeight(np.where(mask, values, np.float32(0)).astype(dtype), mask)
    low, width = ranges
    quantizer = FakeQuantizer(
        4, symmetric, 4, **({"scale": low} if symmetric else {"input_low": low, "input_range": width})
    )
    result = merge_fq_lora(base, replace(quantizer, **none(3, 8)), None, "layer")
    assert result.revived == 0 and result.weight.mask is mask
    points = np.repeat(result.weight.zero_points, 4, axis=1)
    assert (result.weight.codes[~mask] == points[~mask]).all()


def test_pruned_weights_that_the_adapter_moves_are_counted():
    base = f32([0, 0, 0, 1, 0, 0.5])
    adapter = {"a": np.array([[1, 0.5, 0, 1, -1, 0.25]], BF16), "b": np.array([[0.25]], BF16)}
    result = merge_fq_lora(DenseWeight(base, mask_of(base)), asym([[-1]], [[3.75]], **adapter), None, "layer")
    assert result.weight.codes.tolist() == [[5, 4, 4, 9, 3, 6]]  # 0.125 is a tie, and stays zero
    assert result.revived == 2
    assert merge_fq_lora(DenseWeight(base), asym([[-1]], [[3.75]], **adapter), None, "layer").revived == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def layer(**changes):
    good = asym(-np.ones((4, 2)), 3 * np.ones((4, 2)), group=4, a=np.ones((3, 8), BF16), b=np.ones((4, 3), BF16))
    return replace(good, **changes)


BASE, FULL = np.zeros((4, 8), np.float32), np.full((4, 8), 65504, np.float16)
NAN = f32(*[[0, np.nan]] * 4)
REFUSED = {
    "rank above": (BASE, layer(), 4, BadInput, "E_ELASTIC", r"expected 1\.\.3, found 4"),
    "rank 0": (BASE, layer(), 0, BadInput, "E_ELASTIC", "found 0"),
    "rank without adapter": (BASE, layer(a=None, b=None), 1, BadInput, "E_ELASTIC", "no adapter"),
    "more columns": (np.zeros((4, 16), np.float32), layer(), None, BadInput, "E_PAIRING", "does not fit its base"),
    "more rows": (np.zeros((5, 8), np.float32), layer(), None, BadInput, "E_PAIRING", "does not fit its base"),
    "other groups": (BASE, layer(group_size=2), None, BadInput, "E_PAIRING", "does not fit its base"),
    "adapter of other columns": (BASE, layer(a=np.ones((3, 4), BF16)), None, BadInput, "E_PAIRING", "4 x 4"),
    "half an adapter": (BASE, layer(b=None), None, BadInput, "E_NNCF", "incomplete"),
    "no range": (BASE, layer(input_range=None), None, BadInput, "E_NNCF", "incomplete"),
    "ranges differ": (BASE, layer(input_range=np.ones((4, 1), np.float32)), None, BadInput, "E_NNCF", "wrong shape"),
    "range in float64": (BASE, layer(input_range=np.ones((4, 2))), None, BadInput, "E_NNCF", "float64"),
    "adapter ranks differ": (BASE, layer(b=np.ones((4, 2), BF16)), None, BadInput, "E_NNCF", "adapter"),
    "adapter of other rows": (BASE, layer(b=np.ones((5, 3), BF16)), None, BadInput, "E_NNCF", "adapter"),
    "adapter dtypes differ": (BASE, layer(b=np.ones((4, 3), np.float32)), None, BadInput, "E_NNCF", "adapter"),
    "NaN in a range": (BASE, layer(input_low=NAN), None, BadInput, "E_FINITE", "input_low .0, 1."),
    "infinity in B": (BASE, layer(b=np.full((4, 3), np.inf, BF16)), None, BadInput, "E_FINITE", "lora_B"),
    "NaN in the base": (np.full((4, 8), np.nan, np.float32), layer(), None, BadInput, "E_NAN", "NaN"),
    "3 bits": (BASE, layer(bits=3), None, Unsupported, "E_BITS", "expected 4 or 8, found 3"),
    "float64 base": (np.zeros((4, 8)), layer(), None, Unsupported, "E_DTYPE", "float64"),
    "sum overflows": (FULL, layer(a=np.full((3, 8), 1e3, BF16)), None, BadInput, "E_OVERFLOW", "float16"),
    "step overflows": (BASE, layer(input_range=np.full((4, 2), 1e6, np.float32)), None, BadInput, "E_SCALE", "finite"),
    "range too small for float16": (FULL[:1], asym([[0]], [[0]], bits=8), None, BadInput, "E_OVERFLOW", "to float32"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "quantizer", "rank", "kind", "code", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(values, quantizer, rank, kind, code, text):
    with pytest.raises(kind, match=text) as caught:
        merge_fq_lora(DenseWeight(values), quantizer, rank, "layers.0.up_proj")
    assert caught.value.code == code and "layers.0.up_proj" in str(caught.value)


# --- NNCF itself -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nncf():
    """NNCF with strip, without compilers: the C++ extension for quantisers without adapter is written in torch below,
    and the others run as Python instead of through torch.compile. Both were compared with the compiled ones."""
    go_offline()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert transformers.LlamaForCausalLM  # imported before torchao is pretended to be there
    nncf = pytest.importorskip("nncf")
    _import_strip()
    functions = importlib.import_module("nncf.torch.quantization.quantize_functions")
    reference = importlib.import_module("nncf.torch.quantization.reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "QuantizedFunctionsCPU", {"Quantize_forward": cpp_forward})
        patch.setattr(reference.torch_forward, "_compiled_func", reference.torch_executor.forward)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield nncf


def _import_strip():
    """strip.py imports torchao for a format that is not used here."""
    try:
        importlib.import_module("torchao")
        absent = []
    except ModuleNotFoundError:
        absent = ["torchao", "torchao.quantization", "torchao.quantization.pt2e", "torchao.quantization.pt2e.observer"]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    if absent:
        sys.modules[absent[-1]].MinMaxObserver = sys.modules[absent[-1]].PerChannelMinMaxObserver = None
    importlib.import_module("nncf.torch.function_hook.strip")
    for name in absent:
        del sys.modules[name]


def cpp_forward(values, low, width, levels):
    """What NNCF's C++ extension does, with the same operations of torch: a true division, and every dtype its own."""
    import torch

    per_unit = torch.full_like(width, levels - 1).div_(width)
    output = torch.max(torch.min(values, low + width), low)
    zero = (-low * per_unit).round_()
    return output.sub_(low).mul_(per_unit).sub_(zero).round_().div_(per_unit)


def numpy_of(tensor):
    import torch

    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().view(BF16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


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


def grid_of(decompressor):
    """[out, groups] zero-points (0 if symmetric) and scales of a decompressor."""
    from nncf.torch.quantization.layers import unpack_uint4

    scales = numpy_of(decompressor._scale)
    scales = scales.reshape(scales.shape[0], -1)
    if not hasattr(decompressor, "_zero_point"):
        return np.zeros(scales.shape, np.int64), scales
    points = decompressor._zero_point
    packed = hasattr(decompressor, "zero_point_shape")
    return (unpack_uint4(points) if packed else points).numpy().reshape(scales.shape), scales


def assert_same(weight, levels, zero_points, scales, symmetric):
    """Our codes are NNCF's; a symmetric weight is compared as distances from zero, with NNCF's sign of the scale."""
    assert weight.scales.dtype == scales.dtype == np.float16
    assert np.array_equal(weight.scales, np.abs(scales))
    if not symmetric:
        assert np.array_equal(weight.zero_points, zero_points)
        assert np.array_equal(weight.codes, levels)
        return
    distance = weight.codes.astype(int) - np.repeat(weight.zero_points.astype(int), weight.group_size, axis=1)
    assert np.array_equal(distance * np.repeat(np.where(scales < 0, -1, 1), weight.group_size, axis=1), levels)


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
                assert set(np.unique(weight.zero_points)) == {2 ** (bits - 1) - 1, 2 ** (bits - 1)}
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
    import torch
    import transformers
    from nncf.torch.function_hook.wrapper import get_hook_storage

    ids = torch.arange(4)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))
    model = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[mode],
        group_size=32,
        compression_format=nncf.CompressionFormat[compression],
        dataset=nncf.Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]),
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=8),
    )
    storage = get_hook_storage(model)
    with torch.no_grad():
        for _, hook in storage.named_hooks():
            tune(hook)
    torch.save(
        {"nncf_state_dict": storage.state_dict(), "nncf_config": nncf.torch.get_config(model)},
        tmp_path / "nncf_checkpoint.pth",
    )
    with NncfCheckpoint.open(tmp_path, allow_pickle=True) as checkpoint, ModelFolder.open(tiny_base) as base:
        checkpoint.check_base(base)
        turned = 0
        for rank in ranks:
            if rank:
                for _, hook in storage.named_hooks():
                    if hasattr(hook, "set_active_rank"):
                        hook.set_active_rank(rank)
            flat = nncf.strip(model, strip_format=nncf.StripFormat.DQ)
            seen = set()
            for name, decompressor in get_hook_storage(flat).named_hooks():
                module = name.split(".")[1].removesuffix(":weight__0").replace(":", ".")
                quantizer = checkpoint.quantizer(module)
                values = (
                    base.read(f"{module}.weight").astype(np.float32).astype(BF16 if dtype == "bfloat16" else np.float32)
                )
                weight = merged(values, quantizer, rank if module in checkpoint.elastic_ranks() else None)
                levels = levels_of(flat.get_submodule(module).weight, decompressor).reshape(values.shape)
                assert_same(weight, levels, *grid_of(decompressor), quantizer.symmetric)
                turned += int((weight.zero_points == 7).sum()) if quantizer.symmetric else 0
                seen.add(module)
            assert seen == set(checkpoint.modules()) and len(seen) == 16
        assert (turned > 100) == (mode == "INT4_SYM")  # scales below zero are the rule, not an exception


def tune(hook):
    """Move a quantiser's parameters as training would; the adapter's sums stay exact (see `random_layer`)."""
    import torch

    for name, value in hook.get_trainable_params().items():
        if name.startswith("lora"):
            value.copy_(torch.randint(-8, 9, value.shape) / 64)
        else:
            value.mul_(1 + 0.1 * torch.randn_like(value))


def levels_of(weight, decompressor):
    from nncf.torch.quantization.layers import unpack_int4, unpack_uint4

    if not hasattr(decompressor, "compressed_weight_shape"):
        return weight.detach().numpy()
    unpack = unpack_uint4 if hasattr(decompressor, "_zero_point") else unpack_int4
    return unpack(weight.detach()).numpy()
