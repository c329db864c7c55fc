"SignRound: offsets and clipping factors; its limits."

import pytest
import torch
from blocks import error, nearest, nearest_grids
from torch.testing import assert_close

from aespa_nb.baselines.signround import signround
from aespa_nb.errors import AespaError


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_steps_that_reach_nothing_leave_round_to_nearest(task, kind):
    t = task(kind, bits=3, lr=1e-9, iterations=2)
    for n in t.bits:
        weight = t.block.get_submodule(n).weight
        weight[0], weight[1] = 0, weight[1].abs()
    for n, r in signround(t).items():
        assert_close(r.weight(), nearest(t)[n], rtol=1e-6, atol=1e-7)
        assert torch.equal(r.grid.zero, nearest_grids(t)[n].zero)


def test_with_all_sequences_in_a_step_the_best_is_never_worse_than_nearest(task):
    t = task(bits=4, iterations=3, lr=0.4)  # leaps
    assert error(t, signround(t, batch_size=16)) <= error(t, nearest(t)) * (1 + 1e-5)


def test_without_clipping_the_grid_stays(task):
    t = task()
    rounded = signround(t, clip=False)
    assert all(torch.equal(rounded[n].grid.scale, g.scale) for n, g in nearest_grids(t).items())


def test_batches_must_have_sequences(task):
    with pytest.raises(AespaError, match="batch_size"):
        signround(task(), batch_size=0)
