"""Attention-aware post-training quantization of Transformers: the public face; everything else is in the rooms' modules."""

__version__ = "0.1.0"

from importlib import import_module

_HOME = {
    "quantize.model": ["quantize_model"],
    "quantize.config": ["PRESETS", "AespaConfig"],
    "quantize.report": ["QuantReport"],
    "quantize.layer": ["RoundedLayer", "round_layer"],
    "quantize.bit_allocation": ["auto_bits"],
    "data.text": ["calibration_windows", "evaluation_windows", "load_reference"],
    "data.scores": ["evaluate_model", "kl_divergence", "perplexity"],
    "export.checkpoint": ["export_model", "read_quantized"],
    "export.loading": ["load_model"],
    "errors": ["AespaError", "NumericalError", "UnsupportedModelError"],
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
