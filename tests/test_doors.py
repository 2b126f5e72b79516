"""How commands end and what they share: interrupts, MLX that is missing, names."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from helpers import (
    ROOT,
    assert_fails,
    clean_environment,
    heed_ctrl_c,
    need_tiny,
    run_cli,
    run_python,
)
from mm1_mlx.cli import backend
from mm1_mlx.cli.statistics import as_json, statistics
from mm1_mlx.errors import MM1Error

SHAPES = ROOT / "examples" / "shapes.png"


# --- how a command ends ---

DOOR = """
import sys
from mm1_mlx.cli.parser import Parser
from mm1_mlx.cli.run import run_door
def run(args):
    {}
parser = Parser(prog="door", description="")
parser.add_debug()
sys.exit(run_door(parser, run, needs_mlx=False))
"""


def door(body: str, *args: str):
    return run_python("-c", DOOR.format(body), *args)


def test_interrupt_keeps_what_was_printed_and_exits_130():
    done = door("print('so far', end='', flush=True); raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "so far", "")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_the_prompt_is_read_exits_130():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "mm1_mlx.generate", "-p", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        preexec_fn=heed_ctrl_c,
        text=True,
    )
    for line in process.stderr:  # wait until MLX is there: then stdin is read
        if line.rstrip().endswith(" mlx.core"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not out and "Traceback" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_the_answer_comes_keeps_what_was_printed():
    need_tiny()
    # So hot that the end token is as unlikely as any other: the answer is long.
    ask = ("-p", "Describe the picture.", "--image", SHAPES, "--temp", "100", "--quiet")
    process = subprocess.Popen(
        [sys.executable, "-m", "mm1_mlx.generate", *ask, "-m", "100000", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        preexec_fn=heed_ctrl_c,
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert first
    assert process.returncode == 130, error
    assert not error


INTERRUPTING = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("spelling", [("mm1_mlx.generate",), ("mm1_mlx", "generate")])
@pytest.mark.parametrize(
    "module",
    ["argparse", "mm1_mlx.cli.doors", "mm1_mlx.cli.run", "mm1_mlx.errors", "mlx.core"],
)
def test_ctrl_c_while_the_door_is_imported_exits_130(spelling, module, tmp_path):
    """Each import is interrupted by a module that Python loads before all others."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(module))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python("-m", *spelling, "-p", "hi", env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("door", ["info", "benchmark", "pretrain"])
def test_ctrl_c_while_another_door_is_imported_exits_130(door, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format("mm1_mlx.cli.run"))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run_python("-m", f"mm1_mlx.{door}", env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_closed_pipe_is_quiet():
    code = DOOR.format("[print('line', i) for i in range(100_000)]")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        preexec_fn=heed_ctrl_c,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_a_bug_is_one_line_that_asks_for_a_report():
    done = door("raise ValueError('odd\\nthing')")
    assert_fails(done, r"unexpected ValueError: odd thing\. This is a bug")
    assert "Traceback" in door("raise ValueError('odd')", "--debug").stderr


def test_what_the_system_refuses_is_named():
    assert_fails(door("open('/absent/file')"), r"No such file or directory: /absent")


def test_out_of_memory_says_what_to_do():
    body = "raise RuntimeError('[malloc] Unable to allocate 7 bytes.')"
    assert_fails(door(body), r"Not enough memory .*7 bytes.*smaller model")


def test_a_terminal_without_unicode_still_gets_the_answer():
    done = run_python(
        "-c", DOOR.format("print('caf\\u00e9')"), env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, "caf?\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_swallow_what_is_printed(closed):
    done = subprocess.run(
        f"{sys.executable} -m mm1_mlx.info --model mm1-3b {closed}",
        shell=True,
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_prompt_from_a_closed_stdin():
    done = subprocess.run(
        f"{sys.executable} -m mm1_mlx.generate -p - <&-",
        shell=True,
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=ROOT,
    )
    assert_fails(done, "stdin is closed")


def test_a_closed_stdin_keeps_no_model_from_answering():
    """The first file that is opened would be number 0, which MLX cannot read."""
    need_tiny()
    done = subprocess.run(
        f"{sys.executable} -m mm1_mlx.generate -p hi --quiet <&-",
        shell=True,
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_warnings_of_pillow_are_not_shown(tmp_path):
    code = (
        "import sys, warnings\n"
        "from mm1_mlx.cli.parser import Parser\n"
        "from mm1_mlx.cli.run import run_door\n"
        "def run(args):\n"
        "    warnings.warn_explicit('damaged', UserWarning, 'x.py', 1, 'PIL.Image')\n"
        "p = Parser(prog='x', description='d'); p.add_debug()\n"
        "sys.exit(run_door(p, run, sys.argv[1:], needs_mlx=False))"
    )
    assert "damaged" not in run_python("-c", code).stderr
    assert "damaged" in run_python("-c", code, "--debug").stderr


# --- MLX that cannot be loaded ---

ADVICE = [
    ("linux", "x86_64", "", [], r"pip install 'mm1_mlx\[cpu\]'.*cuda12 or cuda13"),
    ("linux", "x86_64", "", ["mlx-cpu", "mlx-cuda-12"], r"more than one back end"),
    ("linux", "x86_64", "", ["mlx-cuda-13"], r"NVIDIA driver for cuda13"),
    ("linux", "x86_64", "", ["mlx-cpu"], r"\(the reason\).*--force-reinstall"),
    ("darwin", "x86_64", "14.5", [], r"x86 Python .*Rosetta.*arm64"),
    ("darwin", "arm64", "13.6.1", [], r"macOS 13\.6\.1, .*needs macOS 14"),
    ("darwin", "arm64", "14.1", [], r"\(the reason\)"),
    ("darwin", "arm64", "10.16", [], r"\(the reason\)"),  # an old Python's answer
    ("win32", "AMD64", "", [], r"does not run on .*WSL"),
]


@pytest.mark.parametrize("system, processor, release, installed, pattern", ADVICE)
def test_advice_names_the_cure(
    system, processor, release, installed, pattern, monkeypatch
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(backend.platform, "machine", lambda: processor)
    monkeypatch.setattr(backend.platform, "mac_ver", lambda: (release, (), ""))
    monkeypatch.setattr(backend, "_installed", lambda name: name in installed)
    advice = backend.advice("the\nreason")
    assert re.search(pattern, advice), advice
    assert "\n" not in advice


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return sys.platform == "linux"


@pytest.mark.skipif(not has_openblas(), reason="Linux's libopenblas0 is not installed")
@pytest.mark.parametrize("through_a_door", [True, False])
def test_commands_multiply_with_openblas(through_a_door):
    """The dynamic linker tells what MLX's matrix product is bound to."""
    start = "from mm1_mlx.cli.backend import require_mlx; require_mlx()\n"
    product = "import mlx.core as mx; mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))"
    done = run_python(
        "-c",
        (start if through_a_door else "") + product,
        env={"LD_PRELOAD": "", "LD_DEBUG": "bindings"},
    )
    (bound,) = re.findall(r"libmlx\.so .* to (\S+) .*cblas_sgemm'", done.stderr)
    assert ("openblas" in bound) == through_a_door


@pytest.mark.skipif(not has_openblas(), reason="Linux's libopenblas0 is not installed")
@pytest.mark.parametrize("own", [None, "24"], ids=["ours", "the user's"])
def test_threads_of_openblas_do_not_keep_a_process_from_ending(own):
    """They sleep long before it ends: one that is about to would be waited for."""
    name = "OPENBLAS_THREAD_TIMEOUT"
    done = run_python(
        "-c",
        "from mm1_mlx.cli.backend import require_mlx; require_mlx()\n"
        f"import os; print(os.environ['{name}'])",
        env={"LD_PRELOAD": ""} | ({name: own} if own else {}),
    )
    assert done.stdout.strip() == (own or "20")


def test_a_machine_without_openblas_is_fine(monkeypatch):
    def absent(*args, **settings):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setitem(sys.modules, "mlx", types.ModuleType("mlx"))
    with pytest.raises(MM1Error):  # this mlx is empty: the search went on
        backend.require_mlx()


def test_mlx_without_a_back_end_is_one_line(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    core = "raise ImportError('libmlx.so: cannot open shared object file')"
    (tmp_path / "mlx" / "core.py").write_text(core)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert_fails(
        run_cli("generate", "-p", "hi", env={"PYTHONPATH": path}), r"MLX .*pip install"
    )


def test_an_old_python_is_told_in_one_line():
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 6, 'final', 0);"
        "sys.argv = ['generate', '-p', 'hi'];"
        "runpy._run_module_as_main('mm1_mlx.generate')"
    )
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer, but this is Python 3.9.6" in done.stderr
    assert done.stderr.count("\n") == 1


# --- a verb and its door share a name ---

ORDERS = {
    "the verb": "from mm1_mlx import generate",
    "the verb, then its door": "from mm1_mlx import generate; import mm1_mlx.generate",
    "the door, then the verb": "import mm1_mlx.generate; from mm1_mlx import generate",
    "the package": "import mm1_mlx; generate = mm1_mlx.generate",
    "the door by its name": "import mm1_mlx.generate; generate = mm1_mlx.generate",
    "everything": "from mm1_mlx import *",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_the_verb_is_found_in_any_order(order):
    code = (
        f"{order}\n"
        "import inspect, mm1_mlx\n"
        "from mm1_mlx.inference.generation import generate as verb\n"
        "for found in (generate, mm1_mlx.generate):\n"
        "    assert callable(found)\n"
        "    assert inspect.signature(found) == inspect.signature(verb)\n"
        "    try:\n"
        "        found(no_such_argument=1)\n"
        "    except TypeError as error:\n"
        "        assert 'generate()' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError\n"
        "from mm1_mlx.generate import main, parser\n"
        "assert parser().prog == 'mm1_mlx generate'\n"
    )
    done = run_python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_door_runs_without_a_warning():
    done = run_python("-W", "error", "-m", "mm1_mlx.generate", "--help")
    assert done.returncode == 0 and not done.stderr


def test_public_names_are_listed_and_found():
    import mm1_mlx

    assert set(mm1_mlx.__all__) <= set(dir(mm1_mlx))
    for name in mm1_mlx.__all__:
        assert getattr(mm1_mlx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        mm1_mlx.genrate  # noqa: B018


# --- statistics, by hand ---


def response(**values):
    plain = {
        "text": "yes",
        "token_ids": [5],
        "finish_reason": "stop",
        "prompt_tokens": 36,
        "reused_tokens": 0,
        "prompt_tps": 1234.5,
        "generation_tokens": 5,
        "generation_tps": 610.0,
        "ttft": 0.054,
        "num_images": 1,
        "image_tokens": 16,
        "image_tiles": 1,
        "image_sizes": ((64, 48),),
        "image_seconds": 0.014,
        "peak_memory": 0.04,
        "drafted_tokens": None,
        "accepted_tokens": None,
    }
    return types.SimpleNamespace(**plain | values)


def test_statistics_by_hand():
    assert statistics(response()) == (
        "==========\n"
        "Image: 1 (64x48), 16 tokens, encode 0.01 s\n"
        "Prompt: 36 tokens, 1234.500 tokens-per-sec\n"
        "Generation: 5 tokens, 610.000 tokens-per-sec\n"
        "TTFT: 0.05 s\n"
        "Peak memory: 0.040 GB"
    )
    assert "Image" not in statistics(response(num_images=0, image_sizes=()))
    cut = statistics(response(num_images=2, image_tiles=6)).splitlines()
    assert cut[1] == "Image: 2 in 6 tiles (64x48), 16 tokens, encode 0.01 s"
    one = statistics(response(generation_tokens=1, generation_tps=float("nan")))
    assert one.splitlines()[3] == "Generation: 1 tokens"
    again = statistics(response(reused_tokens=30)).splitlines()
    assert again[2:4] == [
        "Reused: 30 of 36 prompt tokens",
        "Prompt: 36 tokens, 1234.500 tokens-per-sec",
    ]
    guessed = statistics(response(drafted_tokens=6, accepted_tokens=0)).splitlines()
    assert guessed[4] == "Draft: 0 of 6 tokens accepted"


def test_json_has_no_nan():
    values = json.loads(as_json(response(generation_tps=float("nan")), model="m"))
    assert values["generation_tps"] is None and values["model"] == "m"
