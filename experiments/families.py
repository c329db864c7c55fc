"""Which models work: every family of the table is built small, captured, quantized and measured.

    python experiments/families.py                  all families, three seeds; nbs/runs/families.json
    python experiments/families.py LLaMA T5         only these, printed
    python experiments/families.py --fuzz 200       random configurations: each one works, or ends in one line

No family has code of its own in the library; what stands here is how to build a small model of it.
"""

import argparse
import contextlib
import copy
import random
from collections import Counter

import torch
import transformers as hf
from aespa_nb import AespaConfig, AespaError, quantize_model
from aespa_nb.attention.forward import repeat_kv
from aespa_nb.model.blocks import reading_inputs
from aespa_nb.model.blocks import blocks_of, kind_of, linears_of, stacks_of, weight_of
from aespa_nb.model.capture import Watch, capture_attention, capturing
from aespa_nb.model.statistics import block_losses, survey
from aespa_nb.model.stream import BlockStream
from common import resume, stamp

WORDS = dict(vocab_size=64)
SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
LONG = dict(WORDS, **SIZE, max_position_embeddings=64)
GQA = dict(LONG, num_key_value_heads=2)
HEADS = dict(GQA, head_dim=16)
OLD = dict(WORDS, n_embd=64, n_layer=1, n_head=4, n_positions=64)
NO_FFN = dict(WORDS, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
FEW = dict(num_local_experts=4, num_experts_per_tok=2)
DEEP = dict(q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=1)
DEEP |= dict(n_routed_experts=4, num_experts_per_tok=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=0)
SOUND = dict(d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
SOUND |= dict(encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=24, max_target_positions=64)
SOUND |= dict(decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None)
FAMILIES = {  # name -> (class of transformers, fields of its configuration)
    "LLaMA": ("Llama", GQA),
    "Mistral": ("Mistral", dict(GQA, sliding_window=8)),
    "Qwen2": ("Qwen2", GQA),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", dict(HEADS, **FEW, num_experts=4, moe_intermediate_size=32)),
    "Mixtral": ("Mixtral", dict(GQA, **FEW)),
    "Gemma2": ("Gemma2", dict(HEADS, sliding_window=8, query_pre_attn_scalar=16)),
    "Gemma3": ("Gemma3Text", dict(HEADS, sliding_window=8, query_pre_attn_scalar=16)),
    "Phi": ("Phi", dict(LONG, partial_rotary_factor=0.5)),
    "Phi-3": ("Phi3", GQA),
    "OLMo2": ("Olmo2", GQA),
    "Granite": ("Granite", dict(GQA, attention_multiplier=0.3)),
    "Cohere": ("Cohere", GQA),
    "StarCoder2": ("Starcoder2", GQA),
    "GPT-2": ("GPT2", OLD),
    "GPT-NeoX": ("GPTNeoX", LONG),
    "OPT": ("OPT", dict(NO_FFN, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64)),
    "BLOOM": ("Bloom", dict(WORDS, hidden_size=64, n_layer=1, n_head=4)),
    "MPT": ("Mpt", dict(WORDS, d_model=64, n_layers=1, n_heads=4, max_seq_len=64)),
    "Falcon": ("Falcon", dict(NO_FFN, num_kv_heads=2, new_decoder_architecture=True, alibi=False)),
    "GPT-J": ("GPTJ", dict(OLD, rotary_dim=8)),
    "DeepSeek-V3": ("DeepseekV3", dict(LONG, num_key_value_heads=4, moe_intermediate_size=32, **DEEP)),
    "gpt-oss": ("GptOss", dict(HEADS, sliding_window=8, **FEW)),
    "BERT": ("Bert", LONG),
    "ViT": ("ViT", dict(SIZE, image_size=32, patch_size=8)),
    "Whisper": ("Whisper", dict(WORDS, **SOUND)),
    "T5": ("T5", dict(WORDS, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)),
}
MORE = {  # exported only: no attention error was measured
    "Qwen2-MoE": ("Qwen2Moe", dict(GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                   shared_expert_intermediate_size=32)),
    "OLMoE": ("Olmoe", dict(GQA, num_experts=4, num_experts_per_tok=2)),
    "PhiMoE": ("Phimoe", dict(GQA, **FEW)),
    "GLM-4": ("Glm4", HEADS),
    "SmolLM3": ("SmolLM3", GQA),
}  # fmt: skip
AUTO = dict(BERT=hf.AutoModelForMaskedLM, ViT=hf.AutoModel, Whisper=hf.AutoModelForSpeechSeq2Seq)
AUTO |= dict(T5=hf.AutoModelForSeq2SeqLM)
RECIPES = {  # all on one grid; the last two are aespa and best without their attention-aware losses
    **{preset: (preset, {}) for preset in ("gptq", "aespa", "best")},
    **{f"{preset}, layer-wise": (preset, dict(objective="layer")) for preset in ("aespa", "best")},
}


def build(name: str, seed: int = 0, **changes):
    "A small model of the family. Its weights have structure: a few strong directions over noise, uneven inputs."
    kind, options = (FAMILIES | MORE)[name]
    tokens = {} if name == "ViT" else dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(hf, f"{kind}Config")(**{**tokens, **options, **changes})
    torch.manual_seed(seed)
    model = AUTO.get(name, hf.AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p += 0.1 * torch.randn_like(p)
                continue
            strong = torch.randn(*p.shape[:-1], 3) @ torch.randn(*p.shape[:-2], 3, p.shape[-1]) / 3**0.5
            W, inputs = 0.7 * torch.randn_like(p) + 0.7 * strong, torch.randn(p.shape[-1]).mul(0.5).exp()
            p.copy_(W * inputs / p.shape[-1] ** 0.5)
    return model


def inputs(name: str, seqs: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    "Random inputs, by name."
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 64, (seqs, 24), generator=g)
    if name == "ViT":
        return dict(pixel_values=torch.randn(seqs, 3, 32, 32, generator=g))
    if name == "Whisper":
        return dict(input_features=torch.randn(seqs, 8, 48, generator=g), decoder_input_ids=tokens)
    return dict(input_ids=tokens) | (dict(decoder_input_ids=tokens.flip(1)) if name == "T5" else {})


def block_of(model):
    "The first block of the model's last stack."
    return model.get_submodule(stacks_of(model)[-1])[0]


def first_block(model, data: dict, f):
    "`f(block, stream)` for this block, while attention can be captured."
    path = stacks_of(model)[-1]
    with torch.no_grad(), capturing(model), contextlib.closing(BlockStream(model, data, 1, stack=path)) as stream:
        return f(block_of(model), stream)


def heads_read(model, data, outputs: list[str]) -> dict[str, torch.Tensor]:
    "What the output projections of the first block read: the heads' outputs."
    read = {n: [] for n in outputs}

    def run(block, stream):
        with reading_inputs(block, outputs, lambda n, x: read[n].append(x.detach())):
            stream.run(block)

    first_block(model, data, run)
    return {n: torch.cat(x) for n, x in read.items()}


def reproduction(model, data) -> float:
    "Largest relative difference of V A^T from what the output projections read."
    ours, theirs = [], []
    merge = lambda m, Q, K, V, A: ours.append((A[:] @ repeat_kv(V, Q.shape[1]).mT).transpose(1, 2).flatten(2))

    def run(block, stream):
        found = survey(model, block, stream)
        watch, outputs = Watch() if found.watched else contextlib.nullcontext(), [a.o for a in found.attentions]
        ours.clear()
        with reading_inputs(block, outputs, lambda n, x: theirs.append(x)), capture_attention(merge, block), watch:
            stream.run(block)

    first_block(model, data, run)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def value_loss(model, data) -> float:
    "Relative difference of the loss of V from the change of the heads' outputs when V is changed."
    found, losses = first_block(model, data, lambda b, s: (survey(model, b, s), block_losses(model, b, s).losses))
    attention = found.attentions[0]
    role, moved = attention.roles["v"], copy.deepcopy(model)
    weight, rows = weight_of(block_of(moved), role.linear), role.rows.flatten()
    dW = 0.01 * torch.randn(len(rows), weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight[rows] += dW
    before, after = (heads_read(m, data, [attention.o])[attention.o] for m in (model, moved))
    group = attention.n_heads // len(role.rows)
    true = (after - before).pow(2).sum() / before[..., 0].numel() / group
    loss = next(v for k, v in losses.items() if k in (role.linear, f"{role.linear}[v]"))
    return abs(float(loss(dW.to(loss.H)) / true) - 1)


def attention_errors(name: str, seed: int, iterations: int = 300) -> dict[str, float]:
    "Relative error of the first block's attention outputs on new inputs, with Q, K and V alone rounded to 3 bits."
    model, data, new = build(name, seed), inputs(name, 128, seed), inputs(name, 24, seed + 1000)
    found = first_block(model, data, lambda b, s: survey(model, b, s))
    linears = {r.linear for a in found.attentions for r in a.roles.values()}
    outputs, errors = [a.o for a in found.attentions], {}
    full = heads_read(model, new, outputs)
    for recipe, (preset, options) in RECIPES.items():
        rounded, mixed = copy.deepcopy(model), copy.deepcopy(model)
        quantize_model(rounded, data, AespaConfig.preset(preset, bits=3, iterations=iterations, **options))
        block = block_of(mixed)
        with torch.no_grad():
            for n in linears:
                weight_of(block, n).copy_(weight_of(block_of(rounded), n))
        now, errors[recipe] = heads_read(mixed, new, outputs), 0.0
        for n, x in full.items():
            W = weight_of(block, n).detach()
            errors[recipe] += float(((now[n] - x) @ W.T).pow(2).sum() / (x @ W.T).pow(2).sum())
    return errors


def row(name: str, seeds=range(3)) -> dict:
    "A line of the table."
    model, data = build(name).double(), inputs(name)
    data = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    found = first_block(model, data, lambda b, s: survey(model, b, s))
    attention, linears = found.attentions[0], linears_of(block_of(model))
    config = AespaConfig.preset("best", bits=3)
    report = quantize_model(build(name), inputs(name), config)
    errors = [attention_errors(name, seed) for seed in seeds]
    return dict(
        preset="best",  # stale when it changes
        made=stamp(config),
        captured="registry" if attention.registered else "watched",
        calls=len(found.attentions),
        fused=len({r.linear for r in attention.roles.values()}) < 3,
        position=attention.roles["q"].position,
        experts=sum(n in found.routed for n in linears),
        reproduction=reproduction(model, data),
        value_loss=value_loss(model, data),
        errors={recipe: sum(e[recipe] for e in errors) / len(errors) for recipe in RECIPES},
        notes=sorted({note.split(": ", 1)[1] for note in report.notes}),
    )


def random_case(rng: random.Random) -> tuple[str, dict, dict]:
    "A family, changes of its configuration, and fields of AespaConfig; not all of them can work."
    name = rng.choice(list(FAMILIES))
    sizes = dict(hidden_size=[32, 48, 96], num_attention_heads=[1, 2, 4], num_key_value_heads=[1, 2, 4])
    sizes |= dict(num_hidden_layers=[1, 2], tie_word_embeddings=[True, False])
    known = {"tie_word_embeddings", *FAMILIES[name][1]}
    changes = {k: rng.choice(v) for k, v in sizes.items() if k in known and rng.random() < 0.5}
    choices = dict(
        bits=[2, 3, 4, 8], group_size=[None, None, 8, 16, 20], symmetric=[True, False], correction=[0.0, 0.0, 0.8],
        objective=["layer", "attention", "gauss-newton"], solver=["rtn", "gptq", "gptq+adaround", "descent"],
        tuning=[0, 0, 2], zfold=[True] + 6 * [False], batch_size=[1, 3],
        keep=[{}, {}, {"o_proj": 4}, {"proj": 16}, {"0": 5}],
    )  # fmt: skip
    return name, changes, dict({k: rng.choice(v) for k, v in choices.items()}, iterations=3)


def accounted_for(model, report) -> set[str]:
    "Linears of the blocks that the report neither lists nor names."
    names = {f"{path}.{n}" for path, block in blocks_of(model).items() for n in linears_of(block)}
    kept = {n for n in names if any(part in n and bits == 16 for part, bits in report.config.keep.items())}
    named = {n for n in names if any(note.endswith(kind_of(n.split(".", 3)[-1])) for note in report.notes)}
    return names - set(report.layers) - kept - named


def try_case(seed: int) -> str:
    "Runs a random case: 'works', or the one line that it ended in. Anything else is an error of ours, and raised."
    name, changes, fields = random_case(random.Random(seed))
    try:
        model = build(name, seed, **changes)
        model(**inputs(name, 1))
    except Exception as e:  # the configuration itself is impossible: transformers says so
        return f"not a model: {type(e).__name__}"
    try:
        report = quantize_model(model, inputs(name, 3), AespaConfig(**fields))
    except AespaError as e:
        assert "\n" not in str(e), f"case {seed}: more than one line: {e}"
        return f"refused: {e}"
    assert not (missing := accounted_for(model, report)), f"case {seed} {name}: silently skipped {sorted(missing)[:3]}"
    assert all(p.isfinite().all() for p in model.parameters()), f"case {seed} {name}: not finite"
    return "works"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="none: all, and the table is stored", choices=[[], *FAMILIES])
    parser.add_argument("--fuzz", type=int, metavar="N", help="N random configurations instead")
    args = parser.parse_args()
    if args.fuzz:
        ends = [print(f"{seed:4d} {(end := try_case(seed))}", flush=True) or end for seed in range(args.fuzz)]
        print(dict(Counter(end.split(":")[0] for end in ends)))
    elif args.names:
        print(*(row(name) for name in args.names), sep="\n")
    else:
        resume("families", [dict(family=name) for name in FAMILIES], lambda job: row(job["family"]), whole=True)
