"""The export of a family in each format, read in a new process."""

import formats


def test_what_is_written_is_read_and_what_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(formats, "GROUPS", (32,))
    rows = {r["format"]: r for r in formats.row(dict(family="Qwen2-MoE"))["formats"]}
    assert rows.keys() == set(formats.FORMATS)
    refused = {form for form, r in rows.items() if "refused" in r}
    assert refused == {"gptq", "awq", "gguf"}
    assert all(rows[form]["apart"] < 1e-4 and rows[form]["odd"] == [] for form in rows.keys() - refused)
    assert rows["compressed-tensors"]["kept"] == 9  # eight of experts, and the gate: one row, in two groups
