"""The loss before an activation: the second moment of the Jacobian behind it, whatever the family."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Phi3Config

from aespa_nb.model.statistics import block_losses, survey
from model.test_statistics import TOKENS, first_block
from models import MODELS, SMALL

FIELDS = dict(SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
PHI3 = lambda: AutoModelForCausalLM.from_config(Phi3Config(**FIELDS))  # gate and up in one matrix


@pytest.mark.parametrize("kind, name", [
    ("llama", "mlp.gate_proj"), ("llama", "mlp.up_proj"), ("phi3", "mlp.gate_up_proj"), ("opt", "fc1"),
    ("neox", "mlp.dense_h_to_4h"), ("bloom", "mlp.dense_h_to_4h"),
])  # fmt: skip
def test_second_moment_of_the_jacobian(kind, name, monkeypatch):
    monkeypatch.setitem(MODELS, "phi3", PHI3)
    with first_block(kind, TOKENS[:2]) as (model, block, stream):
        loss = block_losses(model, block, stream, "gauss-newton").losses[name]
        assert_close(loss.H, block_losses(model, block, stream, "layer").losses[name].H)
        behind, ys = survey(model, block, stream).feeds[name], []
        leaf = lambda module, args, y: ys.append(y.detach().requires_grad_()) or ys[0]
        block.get_submodule(name).register_forward_hook(leaf)
        block.get_submodule(behind).register_forward_hook(lambda module, args, y: ys.append(y))
        with torch.enable_grad():
            stream.run(block)
            y, out = ys
            rows = [torch.autograd.grad(o.sum(), y, retain_graph=True)[0].flatten(0, -2) for o in out.unbind(-1)]
        assert_close(loss.G, (sum(J.T @ J for J in rows) / TOKENS[:2].numel())[None])
