"""The export of a family in each format, read in a new process."""

import formats


def test_what_is_written_is_read_and_what_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(formats, "GROUPS", (32,))
    names, by_form = ("Mistral", "GPT-2", "Qwen2-MoE"), lambda rows: {r["format"]: r for r in rows}
    packed, dense, gated = (by_form(formats.row(dict(family=name))["formats"]) for name in names)
    assert packed.keys() == gated.keys() == set(formats.FORMATS)
    found = [*packed.values(), dense["dense"], *(r for r in gated.values() if "refused" not in r)]
    assert all(r["apart"] < 1e-4 and r["odd"] == [] for r in found)
    assert gated["compressed-tensors"]["kept"] == 9  # eight of experts, and the gate: one row, in two groups
    assert {form for form, r in dense.items() if "refused" in r} == {"compressed-tensors", "gptq", "awq", "gguf"}
