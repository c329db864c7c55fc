"Tasks of rounding a block of a small model, as several tests share them."

import contextlib

import torch
from models import small
from torch import nn

from aespa_nb.model.block_tuning import BlockTask, block_error
from aespa_nb.model.blocks import linears_of, stacks_of
from aespa_nb.model.capture import capturing
from aespa_nb.model.stream import BlockStream
from aespa_nb.notation import tiny_inputs, tiny_weight
from aespa_nb.rounding.grid import minmax_grid

TOKENS = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))


def new_task(stack: contextlib.ExitStack, kind="llama", bits=2, model=None, dtype=torch.float32, **options):
    "The task of rounding the first block of a small model, which is `capturing` until the `stack` ends."
    model = model or small(kind, dtype)
    stack.enter_context(capturing(model))
    block = model.get_submodule(stacks_of(model)[0])[0]
    stream, full = (stack.enter_context(contextlib.closing(BlockStream(model, TOKENS))) for _ in range(2))
    full.run(block, keep=True)
    given = dict.fromkeys(linears_of(block), bits), stream, full.hidden
    return BlockTask(model, block, *given, **{"iterations": 30, **options})


def weights(task):
    "Of the linears, by name."
    return {n: task.block.get_submodule(n).weight.detach().clone() for n in task.bits}


def nearest_grids(task):
    return {n: minmax_grid(W, task.bits[n], task.group_size, task.symmetric) for n, W in weights(task).items()}


def nearest(task):
    "Round-to-nearest weights."
    return {n: grid.round(task.block.get_submodule(n).weight) for n, grid in nearest_grids(task).items()}


def error(task, rounded):
    "The block's, with these weights or records."
    made = {f"{n}.weight": (r if isinstance(r, torch.Tensor) else r.weight()) for n, r in rounded.items()}
    return block_error(task.block, task.stream, task.target, made)


class Tokens:
    "Stands for a stream: fixed hidden states, a block that needs nothing else."

    def __init__(self, hidden):
        self.hidden, self.batch_size, self.device, self.dtype = hidden, len(hidden), hidden.device, hidden.dtype

    def arguments(self, seqs):
        return (), {}


def tiny_task(inp=6, seed=0, **options):
    "A block that is one linear, and tokens for it, in float64."
    linear = nn.Linear(inp, inp, bias=False, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(tiny_weight(inp, inp, seed=seed))
    stream = Tokens(tiny_inputs(inp, 64, seed=seed).T[None])
    return BlockTask(None, nn.Sequential(linear), {"0": 2}, stream, stream.hidden @ linear.weight.T, **options)
