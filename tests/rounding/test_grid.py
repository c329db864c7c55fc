"Properties of grids that must hold for any weights."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aespa_nb.rounding.grid import Grid, check_bits, grouped, minmax_grid, storage_bits
from aespa_nb.errors import AespaError, NumericalError
from aespa_nb.notation import tiny_weight

quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)

INP = 12
numbers = st.floats(-1000, 1000, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-100 else 0.0)
weights = st.lists(
    st.lists(numbers, min_size=INP, max_size=INP) | numbers.map(lambda x: [x] * INP), min_size=1, max_size=4
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
bit_widths = st.integers(2, 8)
group_sizes = st.sampled_from([None, 1, 2, 3, 4, 6, 12])


@quick
@given(weights, bit_widths, group_sizes, st.booleans())
def test_minmax_leaves_at_most_half_a_step(W, bits, group_size, symmetric):
    grid = minmax_grid(W, bits, group_size, symmetric)
    scale, zero = grid.expand(INP)
    codes = grid.codes(W)
    assert ((grid.round(W) - W).abs() <= scale * (0.5 + 1e-9)).all()
    assert ((codes >= 0) & (codes <= 2**bits - 1) & (codes == codes.round())).all()
    assert ((zero >= 0) & (zero <= 2**bits - 1)).all()
    assert (grid.round(W)[W == 0] == 0).all()


@quick
@given(weights, weights, bit_widths, group_sizes)
def test_rounding_finds_the_nearest_value_also_where_it_clips(W, other, bits, group_size):
    "The grid of one weight is used for another, which may lie outside it."
    rows = min(len(W), len(other))
    grid = minmax_grid(W[:rows], bits, group_size)
    other = other[:rows]
    every = torch.arange(2.0**bits, dtype=W.dtype)
    scale, zero = (t[..., None] for t in grid.expand(INP))
    distance = (scale * (every - zero) - other[..., None]).abs().amin(-1)
    ours = (grid.round(other) - other).abs()
    assert torch.allclose(ours, distance, rtol=1e-9, atol=1e-12 * max(1.0, other.abs().max().item()))


@quick
@given(weights, bit_widths, group_sizes, st.booleans())
def test_grid_values_round_to_themselves(W, bits, group_size, symmetric):
    grid = minmax_grid(W, bits, group_size, symmetric)
    codes = torch.randint(0, 2**bits, W.shape, generator=torch.Generator().manual_seed(bits)).to(W.dtype)
    assert torch.equal(grid.codes(grid.values(codes)), codes)


@quick
@given(weights, bit_widths, st.integers(-20, 20), st.booleans())
def test_the_unit_of_the_weights_does_not_matter(W, bits, exponent, symmetric):
    "A power of two changes no digit: the scale follows, the codes stay."
    W = W[(W != 0).any(-1)]
    before, after = minmax_grid(W, bits, 4, symmetric), minmax_grid(W * 2.0**exponent, bits, 4, symmetric)
    alive = grouped(W, 4).ne(0).any(-1)  # the scale of a group of zeros is 1 in any unit
    assert torch.equal((before.scale * 2.0**exponent)[alive], after.scale[alive])
    assert torch.equal(before.codes(W), after.codes(W * 2.0**exponent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_the_weight_is_left_alone(dtype):
    W = tiny_weight().to(dtype)
    kept = W.clone()
    grid = minmax_grid(W, 3, 4)
    assert grid.scale.dtype == grid.zero.dtype == grid.codes(W).dtype == grid.round(W).dtype == dtype
    assert torch.equal(W, kept)


def test_heads_are_a_leading_axis():
    W = tiny_weight(8, INP)
    grid = minmax_grid(W, 2, 4)
    heads = W.reshape(2, 4, INP)
    assert torch.equal(minmax_grid(heads, 2, 4).codes(heads), grid.codes(W).reshape(2, 4, INP))
    assert torch.equal(grid.view(2, 4).round(heads), grid.round(W).reshape(2, 4, INP))


@pytest.mark.parametrize("bits", [True, 1, 9, 2.0, "2", None])
def test_bits_must_be_a_whole_number_from_2_to_8(bits):
    with pytest.raises(AespaError, match="bits must be a whole number"):
        check_bits(bits)


def test_what_cannot_be_a_grid_is_refused():
    one = torch.ones(4, 1)
    for scale, zero, error in [
        (one, torch.ones(4, 2), AespaError),
        (0 * one, one, NumericalError),
        (one / 0, one, NumericalError),
        (one, one / 2, NumericalError),
        (one, one * float("nan"), NumericalError),
    ]:
        with pytest.raises(error):
            Grid(2, scale, zero)
    with pytest.raises(AespaError, match="does not fit 5 inputs"):
        Grid(2, torch.ones(4, 2), torch.ones(4, 2)).codes(torch.ones(4, 5))


def test_storage_counts_every_stored_bit():
    "Against counting them for a weight of 3 rows of 64 in groups of 16."
    codes, groups = 3 * 64, 3 * 64 // 16
    assert storage_bits(4, 16) * codes == pytest.approx(4 * codes + groups * (16 + 4))
    assert storage_bits(4, 16, symmetric=True) * codes == pytest.approx(4 * codes + groups * 16)
