"On an NVIDIA GPU: every preset does what it does on a CPU, wherever the model lies."

import pytest
import torch
from aespa_nb import PRESETS, AespaConfig, quantize_model
from aespa_nb.experiments.cost import random_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TOKENS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_does_what_a_cpu_does(preset):
    "Sums in another order lead to other codes here and there, and to losses that are as good."
    steps = dict(iterations=10) | (dict(end_to_end=2) if "end_to_end" in PRESETS[preset] else {})
    config = AespaConfig.preset(preset, 3, group_size=16, **steps)
    losses = {}
    for lies, works in (("cpu", None), ("cuda", None), ("cpu", "cuda")):
        model = random_model("tiny", 1, 64).to(lies)
        report = quantize_model(model, TOKENS, AespaConfig(**{**vars(config), "device": works}))
        losses[lies, works] = sum(layer.loss for layer in report.layers.values())
        assert all(p.device.type == lies for p in model.parameters())
    assert losses["cuda", None] == pytest.approx(losses["cpu", None], rel=0.05)
    assert losses["cpu", "cuda"] == pytest.approx(losses["cuda", None], rel=0.01)
