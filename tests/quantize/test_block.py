"What a solver is given: damped losses, and targets that undo the accumulated errors."

from unittest import mock

import pytest
import torch
from models import small
from torch.testing import assert_close

from aespa_nb import AespaConfig, quantize_model
from aespa_nb.model.blocks import stacks_of
from aespa_nb.quantize.config import SOLVERS

TOKENS = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(0))


def given(model, **recipe):
    "Rounds the model to nearest; (U, H, G) of every layer, as its solver gets them, by its name in its block."
    seen = []

    def solve(U, grid, loss, config):
        seen.append((U.clone(), loss.H.clone(), None if loss.G is None else loss.G.clone()))
        return grid.codes(U), grid

    with mock.patch.dict(SOLVERS, recorded=solve):
        config = AespaConfig(solver="recorded", grid="minmax", dtype=torch.float64, **recipe)
        report = quantize_model(model, TOKENS, config)
    return dict(zip(report.layers, seen[-len(report.layers) :], strict=True))  # before, solvers are warmed up


@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
def test_losses_are_damped_by_the_recipes_share(objective):
    plain, damped = (given(small(), objective=objective, damping=d) for d in (0, 0.25))
    for name, (_, *matrices) in plain.items():
        if "layers.0" not in name:  # later blocks have read other outputs
            continue
        for M, more in zip(matrices, damped[name][1:]):
            if M is not None:
                share = 0.25 * M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(M.shape[-1]).to(M)
                assert_close(more - M, share, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("objective", ["layer", "attention", "gauss-newton"])
@pytest.mark.parametrize("samples", [2, 8])
def test_inputs_are_damped_more_where_tokens_are_few(objective, samples):
    plain, damped = (given(small(), objective=objective, pseudo_tokens=c, samples=samples) for c in (0.0, 3.0))
    for name, (_, H, G) in plain.items():
        if "layers.0" in name:
            share = 3 * H.shape[-1] / (24 * samples) / 1.01  # what is there has been damped by 1 %
            more = share * H.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(H.shape[-1]).to(H)
            assert_close(damped[name][1] - H, more, atol=1e-9, rtol=1e-6)
            assert G is None or G.equal(damped[name][2])  # outputs are not


@pytest.mark.parametrize("share, pseudo_tokens", [(0.0, 0.0), (0.6, 2.0), (1.0, 0.0)])
def test_targets_undo_the_error_of_the_input_and_of_the_stream(share, pseudo_tokens):
    full, model = small(dtype=torch.float64), small(dtype=torch.float64)
    found = given(model, objective="layer", correction=share, bits=3, pseudo_tokens=pseudo_tokens)

    def read(model, stage):
        "What o_proj or down_proj of the second block reads, and the stream that its output is added to: rows."
        block, caught = model.get_submodule(stacks_of(model)[0])[1], {}
        into = dict(o_proj=block.self_attn.o_proj, down_proj=block.mlp.down_proj)[stage]
        stream = dict(o_proj=block.input_layernorm, down_proj=block.post_attention_layernorm)[stage]
        hooks = [m.register_forward_pre_hook(lambda m, args, k=k: caught.update({k: args[0].flatten(0, 1)}))
                 for k, m in (("x", into), ("h", stream))]  # fmt: skip
        model(TOKENS)
        for hook in hooks:
            hook.remove()
        return caught["x"], caught["h"], into.weight.clone()

    for stage, name in (("o_proj", "self_attn.o_proj"), ("down_proj", "mlp.down_proj")):
        (x_full, h_full, W), (x, h, _) = read(full, stage), read(model, stage)
        H = x.T @ x
        damping = 0.01 + pseudo_tokens * len(H) / TOKENS.numel()
        H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        repair = torch.linalg.solve(H, x.T @ (x_full - x) @ W.T + x.T @ (h_full - h)).T
        assert repair.norm() > 0.01 * W.norm()
        assert_close(found[f"model.layers.1.{name}"][0], W + share * repair, rtol=1e-6, atol=1e-8)
        if share:  # both parts matter
            assert (x.T @ (h_full - h)).norm() > 1e-3 * (x.T @ (x_full - x) @ W.T).norm() > 0
