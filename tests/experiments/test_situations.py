"""Random situations, drawn again: none ends badly, and both ends are met."""

import situations


def test_a_few_random_situations():
    ends = {seed: situations.situation(seed)["end"] for seed in range(1000, 1006)}
    assert set(ends.values()) == {"done", "refused"}, ends
