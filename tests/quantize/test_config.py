"The recipe: defaults that the book names, and what is no recipe."

import pytest

from aespa_nb import AespaConfig
from aespa_nb.quantize.config import PRESETS, Recipe


def test_the_default_is_the_papers_solver_with_nothing_of_ours():
    config = AespaConfig()
    assert (config.objective, config.solver) == ("attention", "gptq+adaround")
    assert (config.starts, config.correction, config.tuning, config.zfold) == (1, 0.0, 0, False)
    assert (config.iterations, config.damping) == (2000, 0.01)


def test_max_is_best_with_tuned_scales():
    assert PRESETS["max"] == PRESETS["best"] | dict(tuning=40)


def test_fields_are_named():
    with pytest.raises(ValueError, match="positional"):
        Recipe(3)
