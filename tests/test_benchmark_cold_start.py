"""benchmark start beside a peer: whole processes that answer one token."""

import json

import pytest
from test_benchmark_generate import SMALL, fake_python

from mm1_mlx.benchmarks import cold_start
from mm1_mlx.errors import MM1Error


def test_cold_start_beside_a_peer(tmp_path):
    python = fake_python(tmp_path, "exit 0")
    (tmp_path / "m").mkdir()
    cases = {"small": (SMALL, True), "text": (SMALL, False)}
    starts = cold_start.measure_cold_start(tmp_path / "m", python, 2, cases=cases)
    assert [start.what for start in starts] == ["small", "text"]
    assert all(start.ratio.least > 1 for start in starts)  # a shell is faster
    table = cold_start.as_table(starts, 2, "1.0")
    assert "mlx-vlm: 1.0" in table and "<= 0.25 MISSED" in table
    values = cold_start.as_object(starts, 2, "1.0")
    assert values["starts"][0]["met"] is False and values["goal"]["bound"] == 0.25
    assert json.loads(json.dumps(values)) == values


def test_cold_start_of_a_peer_that_fails(tmp_path):
    python = fake_python(tmp_path, "echo 'no model' >&2; exit 1")
    (tmp_path / "m").mkdir()
    with pytest.raises(MM1Error, match="mlx-vlm failed with code 1: no model"):
        cold_start.measure_cold_start(
            tmp_path / "m", python, 1, cases={"small": (SMALL, True)}
        )
