"Exact descent: never rises, its backends agree, it finds what brute force finds, and it is not above AdaRound."

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding.problems import draw, gram
from torch.testing import assert_close

from aespa_nb.rounding import descent, moves
from aespa_nb.rounding.adaround import adaround
from aespa_nb.rounding.descent import DescentResult, descend, whole_moves
from aespa_nb.rounding.gptq import gptq
from aespa_nb.rounding.grid import Grid, minmax_grid
from aespa_nb.rounding.grid_search import fit_grid
from aespa_nb.rounding.hessian import damp, quadratic_loss
from aespa_nb.rounding.moves import pick_backend
from aespa_nb.errors import AespaError

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)
backends = ["torch"] + ["numba"] * (moves.numba is not None)


def loss_of(W, result, H, G=None):
    "The loss in float64, from scratch: of each row, or with G of each head."
    E = (result.grid.values(result.codes) - W).double()
    rows = ((E @ H.double() if G is None else G.double() @ E @ H.double()) * E).sum(-1)
    return rows if G is None else rows.sum(-1)


cases = dict(
    seed=seeds,
    bits=st.integers(2, 4),
    group_size=st.sampled_from([None, 6, 3]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),  # 4: ill-conditioned, with a dead input
    rank=st.sampled_from([2, 40]),  # 2: singular
    coupled=st.sampled_from([None, 1, 20]),  # rank of G
    own_H=st.booleans(),
)


@pytest.mark.parametrize("backend", backends)
@quick
@given(**cases, double=st.booleans(), symmetric=st.booleans())
def test_loss_never_rises(backend, seed, bits, group_size, spread, rank, coupled, own_H, double, symmetric):
    dtype = torch.float64 if double else torch.float32
    W = draw(seed, 2, 4, 12, dtype=dtype)
    H = gram(seed + 1, 12, rank, spread, heads=(2,) if own_H else ()).to(dtype)
    G = None if coupled is None else gram(seed + 2, 4, coupled, heads=(2,)).to(dtype)
    grid = minmax_grid(W, bits, group_size, symmetric)
    before = W.clone(), H.clone(), grid.scale.clone()
    r = descend(W, grid, H, G, backend=backend)
    assert (r.losses.diff(dim=0) <= 0).all() and r.losses.isfinite().all()
    assert r.losses.shape[1:] == (W.shape[:-1] if G is None else W.shape[:-2])
    assert ((r.codes >= 0) & (r.codes <= grid.max_code) & (r.codes == r.codes.round())).all()
    assert (r.grid.scale > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (W, H, grid.scale)))
    scale = 1e-12 if double else 1e-5
    assert_close(r.losses[-1], loss_of(W, r, H, G), rtol=scale, atol=scale * float(r.losses[0].max() + H.abs().max()))


@pytest.mark.skipif(moves.numba is None, reason="numba is not installed")
@quick
@given(**cases)
def test_backends_agree(seed, bits, group_size, spread, rank, coupled, own_H):
    W = draw(seed, 2, 4, 12)
    H = damp(gram(seed + 1, 12, rank, spread, heads=(2,) if own_H else ()))
    G = None if coupled is None else damp(gram(seed + 2, 4, coupled, heads=(2,)))
    a, b = (descend(W, minmax_grid(W, bits, group_size), H, G, backend=k) for k in ("torch", "numba"))
    assert torch.equal(a.codes, b.codes)
    assert_close(a.grid.scale, b.grid.scale)
    assert_close(a.losses, b.losses)


@pytest.mark.skipif(moves.numba is None, reason="numba is not installed")
@pytest.mark.parametrize("coupled", [False, True])
def test_blocks_of_columns_and_threads_change_nothing(coupled):
    W, H = draw(1, 3, 7, 300), damp(gram(2, 300, 400))
    G = damp(gram(3, 7, 20)) if coupled else None
    options = dict(start=gptq(W, H, minmax_grid(W, 2)).codes, sweeps=(3, 0))
    slow = descend(W, minmax_grid(W, 2), H, G, backend="torch", **options)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(descend(W, minmax_grid(W, 2), H, G, backend="numba", **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r.codes, slow.codes) for r in found)
    assert torch.equal(found[0].grid.scale, found[1].grid.scale)


@quick
@given(seeds, st.booleans())
def test_ends_where_no_single_move_helps(seed, coupled):
    W, H = draw(seed, 4, 6), damp(gram(seed + 1, 6, 20))
    G, grid = damp(gram(seed + 2, 4, 20)) if coupled else torch.eye(4).double(), minmax_grid(W, 2)
    r = descend(W, grid, H, G if coupled else None, refit=False, sweeps=(50, 0), worth=0)
    for i, j, k in itertools.product(range(4), range(6), range(4)):
        E = grid.values(r.codes.index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(float(k)).double())) - W
        assert ((G @ E @ H) * E).sum() >= r.loss - 1e-10


@quick
@given(seeds, st.sampled_from([None, 4]), st.booleans())
def test_refit_is_the_minimum_of_each_step(seed, group_size, coupled):
    W, H = draw(seed, 3, 8), damp(gram(seed + 1, 8, 20))
    G, grid = damp(gram(seed + 2, 3, 20)) if coupled else None, minmax_grid(W, 3, group_size)
    r = descend(W, grid, H, G, sweeps=(200, 0), worth=0)
    total = loss_of(W, r, H, G).sum()
    for i, g in itertools.product(range(3), range(grid.scale.shape[1])):
        for factor in (0.999, 1.001):
            scale = r.grid.scale.clone()
            scale[i, g] *= factor
            moved = DescentResult(r.codes, Grid(3, scale, r.grid.zero), r.losses)
            assert loss_of(W, moved, H, G).sum() >= total * (1 - 1e-5)


def test_refit_equals_a_search_over_steps():
    W, H = draw(5, 1, 10), damp(gram(6, 10, 30))
    grid = minmax_grid(W, 2)
    r = descend(W, grid, H, start=grid.codes(W), sweeps=(1, 0))
    C, scan = r.codes - grid.zero, torch.linspace(0.3, 2, 20001, dtype=torch.float64)[:, None] * grid.scale
    E = scan * C - W
    assert_close(scan[((E @ H) * E).sum(-1).argmin()], r.grid.scale[0], rtol=1e-4, atol=0)


def test_brute_force():
    "On rows of eight weights, descent from GPTQ is optimal at least as often as GPTQ and as AdaRound."
    W, H = draw(11, 120, 8), damp(gram(12, 8, 40))
    grid = fit_grid(W, H, 2, n_clip=30)
    rows = lambda codes: ((grid.values(codes) - W) @ H * (grid.values(codes) - W)).sum(-1)
    every = torch.tensor(list(itertools.product(range(4), repeat=8)), dtype=torch.float64)[:, None]
    least = torch.stack([rows(part).amin(0) for part in every.expand(-1, len(W), -1).split(4096)]).amin(0)
    first = gptq(W, H, grid)
    learned = adaround(W, grid, lambda dW: quadratic_loss(dW, H), first.W_comp, 500, 30 / 500, loss_scale=0.1)
    found = descend(W, grid, H, start=first.codes, refit=False)
    hits = lambda codes: int((rows(codes) <= least * (1 + 1e-9)).sum())
    assert hits(found.codes) >= max(hits(first.codes), hits(learned))


def test_refuses():
    W, H = draw(1, 4, 6), damp(gram(2, 6, 20))
    grid = minmax_grid(W, 2)
    for bad in (dict(G=H), dict(start=W[:2]), dict(sweeps=(-1, 0)), dict(sweeps=(1, -1)), dict(backend="x")):
        with pytest.raises(AespaError):
            descend(W, grid, H, **bad)


def test_without_the_extras(monkeypatch):
    "With neither numba nor Triton the torch kernels are used, and asking for the others is refused."
    monkeypatch.setattr(moves, "numba", None)
    monkeypatch.setattr(moves, "triton", None)
    assert pick_backend(None, torch.device("cpu")) == pick_backend(None, torch.device("cuda")) == "torch"
    for name in ("numba", "triton"):
        with pytest.raises(AespaError, match="not installed"):
            pick_backend(name, torch.device("cpu"))


def test_ties_stay():
    assert whole_moves(torch.tensor([0.5, -0.5, 1.5, 0.7, -2.6])).tolist() == [0, 0, 1, 1, -3]


TRITON = """
import torch
from aespa_nb.rounding.descent import descend
from aespa_nb.rounding.grid import minmax_grid
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
for heads_H, coupled, group in ((2, False, 5), (1, True, None), (2, True, 5)):
    W, X, Y = draw(2, 3, 10), draw(heads_H, 10, 30), draw(2, 3, 9)
    H, G = X @ X.mT / 30, Y @ Y.mT / 9 if coupled else None
    options = dict(sweeps=(3, 1))
    a, b = (descend(W, minmax_grid(W, 2, group), H, G, backend=k, **options) for k in ("torch", "triton"))
    assert torch.equal(a.codes, b.codes), (heads_H, coupled)
    torch.testing.assert_close(a.losses, b.losses)
"""


@pytest.mark.slow
@pytest.mark.skipif(moves.triton is None, reason="needs Triton: pip install triton==3.9.0 (1 GB)")
def test_triton_kernels_in_the_interpreter():
    "In a process of its own: the interpreter must be chosen before Triton is imported."
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    subprocess.run([sys.executable, "-c", TRITON], env=env, check=True)


def test_coupled_rows_are_solved_alike_alone_and_beside_others():
    W, H, G = draw(0, 1, 100, 12), gram(1, 12, 40, 1.0), gram(2, 100, 300)[None]  # more rows than one block has
    solve = lambda n: descend(W.repeat(n, 1, 1), minmax_grid(W.repeat(n, 1, 1), 2), H, G.repeat(n, 1, 1))
    alone, both = solve(1), solve(2)
    assert torch.equal(both.codes, alone.codes.repeat(2, 1, 1))


@pytest.mark.parametrize("coupled", [False, True])
def test_blocks_of_columns_narrower_than_a_layer(monkeypatch, coupled):
    monkeypatch.setattr(descent, "BLOCK", 5)
    monkeypatch.setattr(descent, "CHAIN_BLOCK", 7)
    W, H = draw(31, 2, 6, 40), damp(gram(32, 40, 30))
    G = damp(gram(33, 6, 20, heads=(2,))) if coupled else None
    singles = descend(W, minmax_grid(W, 2), H, G, refit=False, sweeps=(20, 0))
    r = descend(W, minmax_grid(W, 2), H, G, start=singles.codes, refit=False, sweeps=(0, 6))
    assert (r.losses.diff(dim=0) <= 0).all() and r.loss < singles.loss  # chains gain
    assert_close(r.losses[-1], loss_of(W, r, H, G))


def test_rows_side_by_side_are_taken_only_where_they_help_each_other():
    own, pair = torch.tensor([-3.0, -2.0, -1.0, 0.0]), torch.tensor([1.6, 0.4, -9.0])
    M = torch.zeros(4, 4)
    M[0, 1:], M[1:, 0] = pair, pair
    taken = descent._taken(own[None].numpy(), M[None].numpy())
    assert taken.tolist() == [[1, 0, 1, 1]]  # 2 * 1.6 is more than the second gains; the last gains beside the first
    for seed in range(8):
        W, H, G = draw(seed, 1, 40, 12), gram(seed + 1, 12, 20), gram(seed + 2, 40, 8 + 4 * seed)[None]
        r = descend(W, minmax_grid(W, 2), H, G, sweeps=(4, 4))
        assert (r.losses.diff(dim=0) <= 0).all() and r.loss < r.losses[0].sum()


def test_codes_whose_sum_half_precision_does_not_hold():
    W, H = draw(5, 2, 300, dtype=torch.float32).half().repeat(150, 1), damp(gram(6, 300, 400)).float()
    r = descend(W, minmax_grid(W, 2), H, sweeps=(1, 0))
    assert r.losses.isfinite().all() and r.loss < r.losses[0].sum()
