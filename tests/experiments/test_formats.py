"""The export of a family in each format, read in a new process."""

import formats


def test_what_is_written_is_read_and_what_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(formats, "GROUPS", (32,))
    packed, dense, gated = (formats.row(dict(family=name))["formats"] for name in ("OLMo2", "GPT-2", "Qwen2-MoE"))
    assert [r["format"] for r in packed] == list(formats.FORMATS)
    assert all(r["apart"] < 1e-4 and r["odd"] == [] for r in (*packed, *gated) if "refused" not in r)
    assert gated[-2]["kept"] == 9  # eight of experts, and the gate: one row, in two groups
    assert [r["format"] for r in dense if "refused" in r] == ["compressed-tensors", "gptq"]
    assert dense[-1]["format"] == "dense" and dense[-1]["apart"] < 1e-4
