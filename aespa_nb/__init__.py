"""Attention-aware post-training quantization of Transformers: the public face; everything else is in the chapters' modules."""

__version__ = "0.1.0"

from importlib import import_module

_HOME = {
    "aespa": ["PRESETS", "AespaConfig", "QuantReport", "quantize_model"],
    "data": ["calibration_tokens", "evaluation_tokens", "load_reference"],
    "evaluate": ["evaluate_model", "kl_divergence", "perplexity"],
    "notation": ["AespaError"],
}
__all__ = [name for names in _HOME.values() for name in names]


def __getattr__(name: str):
    "Imports a public name when it is first asked for, so that importing a single chapter's module stays fast."
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
