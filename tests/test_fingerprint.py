"""What every method makes of four models: codes, scales and zero-points, as they were when the record was made.

On the kind of processor that made the record every bit must be the same; on others, where sums are added in another
order, the losses must be alike. `python tests/test_fingerprint.py write` makes the record anew: do that only when
results are meant to change, together with `NUMERICS`.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from run_nbs import ENV, arithmetic  # noqa: E402

RECORD = Path(__file__).with_name("fingerprint.json")
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
PRESETS = "rtn gptq adaround aespa best max brecq signround awq turboboa".split()
TRAINED = "gptq best awq".split()  # also on a trained block, which takes longer
FEW = dict(adaround=dict(iterations=6), aespa=dict(iterations=6), max=dict(end_to_end=3))
FEW |= dict(brecq=dict(iterations=4), signround=dict(iterations=4))
GROUPS = dict(group_size=16, keep={"down_proj": 4, "k_proj": 3, "layers.1.mlp.up_proj": 16})


def models():
    "Name, seed, model, tokens and changes of the recipe: OPT, experts, groups and mixed bits, a trained block."
    import torch
    from aespa_nb import load_reference
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

    moe = dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    kinds = dict(
        opt=(0, lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)), {}),
        moe=(1, lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, **moe)), {}),
        gqa=(1, lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48)), GROUPS),
    )
    for preset in PRESETS:
        for name, (seed, build, changes) in kinds.items():
            if name == "moe" and preset in ("brecq", "signround", "awq"):
                continue  # whole-block methods know no experts
            torch.manual_seed(seed)
            model = build().eval().requires_grad_(False)
            for parameter, p in model.named_parameters():
                if ".layers." in parameter:  # random blocks add little to the stream
                    p.copy_(10 * p if p.ndim >= 2 else p + 0.1 * torch.randn(p.shape))
            yield preset, name, seed, model, torch.randint(0, 64, (6, 32)), changes
        if preset in TRAINED:
            model, _, calib, _ = load_reference()
            model.model.layers = model.model.layers[:1]
            yield preset, "bundled", 0, model, calib[:6, :64], {}


def measure():
    "A digest and the summed losses of each run."
    import torch
    from aespa_nb import AespaConfig, quantize_model

    runs = {}
    for preset, name, seed, model, tokens, changes in models():
        config = AespaConfig.preset(preset, bits=2 + seed, seed=seed, samples=4, **FEW.get(preset, {}), **changes)
        digest, total = hashlib.sha256(), 0.0
        for linear, r in quantize_model(model, tokens, config).layers.items():
            for t in (r.codes, r.grid.scale, r.grid.zero, r.zeta):
                digest.update(f"{linear} {tuple(t.shape)}".encode() + t.float().contiguous().numpy().tobytes())
            total += r.loss
        runs[f"{preset} {name} {seed}"] = [digest.hexdigest()[:12], float(f"{total:.4g}")]
    torch.set_grad_enabled(True)
    return dict(arithmetic=arithmetic(), runs=runs)


def test_every_method_gives_what_it_gave():
    env = {**os.environ, **ENV}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    old, new = json.loads(RECORD.read_text()), json.loads(done.stdout)
    assert old["runs"].keys() == new["runs"].keys()
    if old["arithmetic"] == new["arithmetic"]:
        assert not [key for key, run in new["runs"].items() if run != old["runs"][key]]
    assert all(abs(run[1] - old["runs"][key][1]) <= 0.1 * abs(old["runs"][key][1]) for key, run in new["runs"].items())


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        os.environ.update(ENV)
        again = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, cwd=ROOT)
        RECORD.write_text(json.dumps(json.loads(again.stdout), indent=0) + "\n")
    else:
        import torch

        torch.set_grad_enabled(False)
        print(json.dumps(measure()))
