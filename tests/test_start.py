"""What is imported, and when: start-up stays short and needs no network."""

import json
import re

import pytest

from helpers import need_tiny, run_cli, run_python

HEAVY = {"mlx", "numpy", "PIL", "tokenizers", "sentencepiece", "jinja2"}
NEVER = {
    # other frameworks
    *("torch", "transformers", "mlx_lm", "mlx_vlm", "matplotlib", "scipy", "sklearn"),
    # the network
    *("requests", "urllib3", "httpx", "httpx2", "httpcore", "aiohttp"),
    *("huggingface_hub", "http.client", "urllib.request", "ssl", "socket", "asyncio"),
}


def imported(*args: object) -> tuple[set[str], str]:
    """Every module that a Python with `args` imports, and what it printed."""
    done = run_python("-X", "importtime", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, re.MULTILINE)
    return set(lines), done.stdout


def found(modules: set[str], wanted: set[str]) -> list[str]:
    """Which of `wanted` are among the modules, they or something inside them."""
    return sorted(
        w for w in wanted if any(m == w or m.startswith(w + ".") for m in modules)
    )


def test_the_check_sees_an_import():
    modules, _ = imported("-c", "import numpy, http.client")
    assert found(modules, HEAVY | NEVER) == ["http.client", "numpy", "socket", "ssl"]


def test_import_loads_nothing_heavy():
    modules, _ = imported("-c", "import mm1_mlx")
    assert "mm1_mlx" in modules
    assert not found(modules, HEAVY | NEVER)


def test_import_takes_under_a_tenth_of_a_second():
    best = min(_import_seconds() for _ in range(3))
    assert best < 0.1


def _import_seconds() -> float:
    done = run_python("-X", "importtime", "-c", "import mm1_mlx")
    pattern = r"^import time:\s*\d+ \|\s*(\d+) \| mm1_mlx$"
    return int(re.search(pattern, done.stderr, re.MULTILINE).group(1)) / 1e6


@pytest.mark.parametrize(
    "args",
    [
        ("mm1_mlx", "--help"),
        ("mm1_mlx", "--version"),
        ("mm1_mlx.generate", "--help"),
        ("mm1_mlx", "generate", "--help"),
        ("mm1_mlx.benchmark", "--help"),
        ("mm1_mlx.evaluate", "--help"),
        ("mm1_mlx.info", "--help"),
        ("mm1_mlx.pretrain", "--help"),
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(args):
    modules, text = imported("-m", *args)
    assert text
    assert not found(modules, HEAVY | NEVER)


def test_info_of_a_preset_needs_no_mlx():
    modules, _ = imported("-m", "mm1_mlx.info", "--model", "mm1-3b")
    assert not found(modules, HEAVY | NEVER)


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["stream", "json"])
def test_the_answer_loads_no_framework_and_no_network(more):
    need_tiny()
    question = ("--image", "examples/shapes.png", "-p", "What colour is the star?")
    modules, text = imported("-m", "mm1_mlx.generate", *question, *more)
    assert "yellow" in text.lower()
    assert "mlx.core" in modules
    assert not found(modules, NEVER)


def test_benchmark_start_prints_seconds_and_ratios():
    need_tiny()
    done = run_cli("mm1_mlx.benchmark", "start", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert {"system", "processor", "python", "mlx", "mm1_mlx"} <= set(values["machine"])
    timings = {t["name"]: t for t in values["timings"]}
    assert list(timings) == ["yardstick", "import", "help", "answer"]
    assert timings["yardstick"]["ratio"] == 1
    for timing in timings.values():
        assert 0 < timing["least"] <= timing["median"] <= timing["most"]
        expected = timing["median"] / timings["yardstick"]["median"]
        assert timing["ratio"] == pytest.approx(expected)
    # Loose, because one run on a busy machine says little; the goal is 0.5.
    assert timings["help"]["ratio"] < 1
