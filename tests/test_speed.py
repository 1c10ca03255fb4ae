"""The script that measures what cuts save, on a decoder so small that its times mean nothing."""

from __future__ import annotations

from tokprune.eval import speed


def test_measures_what_ran_and_what_the_ledger_says(monkeypatch):
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_key_value_heads=32)
    monkeypatch.setitem(speed.SHAPES, "small", small)
    methods = ("none", "fastv", "vtc_cls+fastv", "visual_exit:layer=2")
    rows = {r.method: r for r in speed.measure("small", rounds=1, new_tokens=3, methods=methods)}
    assert rows["none"].columns == [640] * 4
    assert rows["none"].prefill_ratio == rows["none"].prefill_ledger == rows["none"].decode_ledger == 1
    assert rows["fastv"].columns == [640, 208, 208, 208]
    assert rows["vtc_cls+fastv"].columns == [352, 208, 208, 208]
    assert rows["visual_exit:layer=2"].columns == [640, 640, 64, 64]
    assert rows["visual_exit:layer=2"].keep_ratio is None
    assert 0 < rows["fastv"].prefill_ledger < 1
    assert all(r.decode_s_per_token > 0 for r in rows.values())


def test_overhead_is_measured_with_and_without_padding():
    assert set(speed.overhead(n_layers=4, steps=3, rounds=2)) == {"no padding", "padding"}
