"The recipe: defaults that the book names, and what is no recipe."

import pytest

from aespa_nb import AespaConfig
from aespa_nb.quantize.config import PRESETS, Recipe


def test_the_default_is_the_papers_solver_with_nothing_of_ours():
    config = AespaConfig()
    assert (config.objective, config.solver) == ("attention", "gptq+adaround")
    assert (config.starts, config.correction, config.tuning, config.zfold) == (1, 0.0, 0, False)
    assert (config.iterations, config.damping) == (500, 0.01)


def test_max_is_best_with_the_end_of_the_network():
    assert PRESETS["max"] == PRESETS["best"] | dict(end_loss=True, end_to_end=100)


def test_fields_are_named():
    with pytest.raises(ValueError, match="positional"):
        Recipe(3)
