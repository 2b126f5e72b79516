"""benchmark kernels: each kernel's cases through the host harness; a stand-in for what
a GPU would show; table, JSON, choices, and the refusal where there is no Metal."""

import json
import math
from dataclasses import replace

import mlx.core as mx
import pytest

from helpers import assert_fails, run_here
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.benchmarks import kernels
from mm1_mlx.errors import MM1Error
from mm1_mlx.kernels import metal
from mm1_mlx.kernels.cases import KERNELS, Case, all_cases, difference
from mm1_mlx.kernels.metal import chosen, user_choices


@needs_host
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_through_the_benchmark(name):
    """One case of each, as on a Mac but small: it is used, and right."""
    case = next(iter(KERNELS[name](True)))
    with host_kernels():
        (row,) = kernels.measure_kernels([case], 1, calls=1)
    assert row.kernel == name and row.right, row
    assert row.kernel_seconds > 0 and row.definition_seconds > 0


def test_cases_are_of_every_kernel_and_named():
    cases = all_cases()
    assert {case.kernel for case in cases} == set(KERNELS)
    labels = [(case.kernel, case.shape, case.dtype) for case in cases]
    assert len(set(labels)) == len(labels)
    # The decoders' sizes that mm1_mlx.presets has.
    text = " ".join(case.shape for case in cases)
    for part in ("3072 to 8064", "4096 to 13312", "24 heads on 24", "32 heads on 4"):
        assert part in text


# --- a stand-in: a "kernel" made of MLX's operations, and a clock ---


class Stand:
    """A case whose work asks `chosen`, as a chooser does, and counts its calls."""

    def __init__(self, off: float = 0.0, declines: bool = False):
        self.off, self.declines = off, declines
        self.used = {True: 0, False: 0}

    def case(self, name: str = "stand", **changes) -> Case:
        usual = Case(name, "2 x 3", mx.float32, lambda: [mx.ones((2, 3))], self.work)
        return replace(usual, **changes)

    def work(self, x: mx.array) -> list[mx.array]:
        on = chosen("stand")
        self.used[on] += 1
        if on and not self.declines and (names := metal._WATCHED.get()) is not None:
            names.append("mm1_stand")
        return [x.sum(axis=-1) + self.off * on]


def test_both_ways_are_run_as_often_and_compared():
    stand = Stand(off=0.03)
    done = []
    (row,) = kernels.measure_kernels(
        [stand.case()], 3, calls=4, progress=lambda *step: done.append(step)
    )
    count = 1 + (kernels.WARM_UP + 3) * 4
    assert stand.used == {True: count, False: count}
    assert done == [(0, 1), (1, 1)]
    assert abs(row.error - 0.01) < 1e-6 and not row.right  # 0.03 of 3
    assert row.dtype == "float32"
    assert row.gain == row.definition_seconds / row.kernel_seconds
    assert row.spread[0] <= row.kernel_seconds <= row.spread[1]


def test_a_kernel_that_declines_is_an_error_not_a_gain_of_1():
    with pytest.raises(
        MM1Error, match="stand declined 2 x 3 in float32: there is noth"
    ):
        kernels.measure_kernels([Stand(declines=True).case()], 1)


def test_a_kernel_that_metal_refuses_is_off_and_the_others_go_on():
    def work(x):
        if chosen("stand"):
            raise RuntimeError(
                "[metal::Device] Unable to build\nprogram_source:7: error"
            )
        return [x]

    refused, fine = Stand().case(work=work), Stand().case("stand")
    rows = kernels.measure_kernels([refused, fine], 1, calls=1)
    assert "program_source:7" in rows[0].failure and not rows[0].right
    assert rows[1].right and not rows[1].failure
    assert kernels.choices(rows) == {"stand": False}
    assert "FAILED [metal::Device] Unable to build" in kernels.as_table(rows, 1)
    json.dumps(kernels.as_object(rows, 1), allow_nan=False)


def test_each_call_of_a_chain_waits_for_the_one_before(monkeypatch):
    """Or a lazy back end would drop all but the last, or run them side by side."""
    seen = []

    def work(x):
        seen.append(x)
        return [mx.exp(x)]

    given = mx.array([[1.0, 2.0]])
    kernels._chain(work, [given], 3)
    assert len(seen) == 3
    names = []

    def note(step):
        names.extend([step["name"]] if step["type"] == "primitive" else [])

    def whole(x):
        monkeypatch.setattr(mx, "eval", lambda y: seen.append(y))
        kernels._chain(work, [x], 3)
        return seen[-1]

    mx.export_function(note, whole, given)
    assert names.count("Exp") == 3  # all of them are needed for the last


def test_errors_of_unlike_results():
    one, two = mx.array([1.0, 4.0]), mx.array([1.0, 4.5])
    assert difference([two], [one]) == 0.125
    assert difference([one, two], [one, one]) == 0.125
    assert difference([mx.array([1, 2])], [mx.array([1, 2])]) == 0
    assert difference([mx.array([1, 2])], [mx.array([1, 3])]) == math.inf
    assert difference([one[:1]], [one]) == math.inf
    assert difference([one.astype(mx.float16)], [one]) == math.inf
    assert difference([mx.array([1.0, math.nan])], [one]) == math.inf


# --- what is said of it ---


def row(name="router", gain=2.0, error=1e-7, **changes) -> kernels.Row:
    usual = kernels.Row(
        kernel=name,
        shape="1 x 64, best 2",
        dtype="float32",
        error=error,
        bound=2e-5,
        definition_seconds=gain * 3e-6,
        kernel_seconds=3e-6,
        spread=(2.5e-6, 4e-6),
        gain=gain,
    )
    return replace(usual, **changes)


ROWS = [
    row(gain=0.9),
    row(gain=2.0),
    row("slow", gain=0.5),
    row("slow", gain=1.5),
    row("wrong", gain=9.0),
    row("wrong", gain=9.0, error=math.inf),
    row("even", gain=1.01),
]


def test_choices():
    """By the geometric mean; one that is wrong once is off; even: left as it is."""
    assert kernels.choices(ROWS) == {"router": True, "slow": False, "wrong": False}


def test_the_table():
    table = kernels.as_table(ROWS, 7)
    assert "median of 7 chains of 20" in table
    lines = [x.split() for x in table.splitlines() if x.startswith("router")]
    assert lines[1][:6] == ["router", "1", "x", "64,", "best", "2"]
    assert lines[1][6:] == ["float32", "1.0e-07", "6.0", "3.0", "2.00x"]
    assert [x.endswith("WRONG") for x in table.splitlines()].count(True) == 1
    assert table.endswith("by these figures: router on, slow off, wrong off")
    assert table.startswith("system: ") and "\nmlx: " in table


def test_the_object_is_json():
    found = json.loads(json.dumps(kernels.as_object(ROWS, 7), allow_nan=False))
    assert set(found) == {"machine", "gpu", "runs", "calls", "rows", "choices"}
    assert found["machine"]["mlx"] and found["gpu"]["device_name"]
    assert found["rows"][1] == {
        "kernel": "router",
        "shape": "1 x 64, best 2",
        "dtype": "float32",
        "error": 1e-7,
        "bound": 2e-5,
        "definition_seconds": 6e-6,
        "kernel_seconds": 3e-6,
        "spread": [2.5e-6, 4e-6],
        "gain": 2.0,
        "failure": "",
        "right": True,
    }
    assert [r["right"] for r in found["rows"]].count(False) == 1


# --- the command ---


def test_without_metal_one_line_and_exit_code_1():
    if metal.has_metal():
        pytest.skip("there is Metal here")
    done = run_here("benchmark", "kernels", "--json", "--apply")
    assert_fails(done, "There is no Metal here, .* on a Mac with Apple silicon", code=1)
    assert done.stdout == ""


def test_apply_is_for_kernels_alone():
    assert_fails(run_here("benchmark", "start", "--apply"), "--apply", code=2)
    assert "--apply" in run_here("benchmark", "kernels", "--help").stdout


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """A machine that says it has Metal, whose only kernel is the stand-in."""
    stand = Stand()
    monkeypatch.setenv("MM1_MLX_SETTINGS", str(tmp_path / "settings.json"))
    monkeypatch.setattr(kernels, "has_metal", lambda: True)
    monkeypatch.setattr(
        "mm1_mlx.kernels.cases.KERNELS", {"stand": lambda _: [stand.case()]}
    )
    user_choices.cache_clear()
    yield tmp_path / "settings.json"
    user_choices.cache_clear()


def test_the_command_on_a_mac(mac, capsys, monkeypatch):
    from mm1_mlx.benchmark import main

    ticks = {"stand": 3.0, "": 4.0, "link": 1.0}  # seconds of a chain

    def chain(work, arrays, calls):
        if getattr(work, "__name__", "") != "work":
            return ticks["link"]
        return ticks["stand" if chosen("stand") else ""]

    monkeypatch.setattr(kernels, "_chain", chain)
    assert main(["kernels", "--runs", "2", "--json", "--apply"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["runs"] == 2 and found["choices"] == {"stand": True}
    assert found["rows"][0]["gain"] == 1.5  # the link is taken off: 3 over 2
    assert out.err == f"Wrote to {mac}: stand on.\n"
    assert json.loads(mac.read_text()) == {"kernels": {"stand": True}}
    ticks["stand"] = 5.0
    assert main(["kernels", "--runs", "2", "--apply"]) == 0
    out = capsys.readouterr()
    assert " 0.75x" in out.out and "Wrote to" in out.err
    assert json.loads(mac.read_text()) == {"kernels": {"stand": False}}
    ticks["stand"] = 4.0
    assert main(["kernels", "--apply"]) == 0
    assert "Nothing to write: no kernel is clearly" in capsys.readouterr().err
    assert main(["kernels", "-n", "1"]) == 0
    assert "Wrote" not in capsys.readouterr().err


@pytest.mark.metal
def test_on_a_mac():
    rows = kernels.measure_kernels(all_cases(small=True), 2, calls=4)
    assert [row for row in rows if not row.right] == []
