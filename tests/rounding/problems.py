"Random weights and second moments, as several tests of rounding share them."

import torch

from aespa_nb.rounding.hessian import damp


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram(seed, n, rank, spread=0.0, heads=()):
    "Second moments of `rank` directions; features differ in size by `10**spread`, and the last is dead if spread > 2."
    X = draw(seed, *heads, n, rank) * torch.logspace(0, -spread, n, dtype=torch.float64)[:, None]
    if spread > 2:
        X[..., -1, :] = 0
    return X @ X.mT / rank


def correlated(seed, n, heads=(), damping=0.01):
    "Second moments of features that are mixed at random, damped."
    X = draw(seed, *heads, n, n + 40)
    X = X[..., :n] @ X[..., n:]
    return damp(X @ X.mT / 40, damping)


def layer(seed, out=4, inp=12, heads=()):
    "Weights of some heads, and the H of what each of them reads."
    return draw(seed, *heads, out, inp), correlated(seed + 1, inp, heads)
