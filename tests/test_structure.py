"""The house's rules, read from the source: who imports whom, where things stand."""

import ast
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT, assert_close, assert_equal, need, needs

# Each may import itself and what stands on the lines before it.
ORDER = [
    ["_version", "errors"],
    ["config_checks", "grids"],
    ["config_tiling", "config_boxes"],
    ["config"],
    ["presets"],  # the sizes, as configs
    ["kernels", "memory", "processes"],
    ["models"],
    ["inputs", "checkpoint"],
    ["quantization"],
    ["adapters"],  # by the same parts
    ["convert"],
    ["loading"],
    ["inference"],
    ["training", "evaluation"],
    ["benchmarks"],
    ["cli"],
    ["DOORS"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# Modules at the root of the library that are not doors.
LEAVES = {
    "__init__",
    "_version",
    "errors",
    "config",
    "presets",
    "config_checks",
    "config_tiling",
    "config_boxes",
    "grids",
    "memory",
    "processes",
    "loading",
}

PEERS = "mm1_mlx/benchmarks/peers/"  # the peers' own Pythons run what stands there

# Where a foreign framework may be imported. None: nowhere.
FOREIGN = {
    "torch": ("convert/references/", "convert/verify.py", f"{PEERS}transformers_"),
    "transformers": (
        "mm1_mlx/training/",
        "mm1_mlx/quantization/",
        "convert/references/",
        "convert/verify.py",
        f"{PEERS}transformers_",
    ),
    "mlx_lm": (
        "mm1_mlx/training/",
        "mm1_mlx/quantization/",
        "mm1_mlx/benchmarks/launches.py",  # counts its graphs
        f"{PEERS}mlx_lm_",
    ),
    "mlx_vlm": (f"{PEERS}mlx_vlm_",),
    "matplotlib": ("mm1_mlx/training/",),
    "pyarrow": ("mm1_mlx/checkpoint/parquet_file.py",),
    "av": ("mm1_mlx/inputs/video.py",),
    "wandb": ("mm1_mlx/cli/",),
    "yaml": ("mm1_mlx/cli/",),
    "lmms_eval": ("mm1_mlx/evaluation/lmms_plugin.py",),
    "tamm": (),
    "pytest": (),
    "helpers": (),
    "tests": (),
}


def library_files() -> list[Path]:
    found = [*(ROOT / "mm1_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """`mm1_mlx.models.vision` for its file; convert/ is mm1_mlx.convert."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "convert":
        parts.insert(0, "mm1_mlx")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def room(module: str) -> str:
    """The name of a module's place in ORDER."""
    if module.startswith(("mm1_mlx.convert.__main__", "mm1_mlx.convert.doors")):
        return "DOORS"
    parts = module.split(".")
    first = parts[1] if len(parts) > 1 else "__init__"
    return first if first in RANK or first == "__init__" else "DOORS"


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file.

    What stands under `if TYPE_CHECKING:` is left out: it is never run.
    """
    tree = parsed(path)
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
        for inner in ast.walk(child)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


FILES = library_files()
PATHS = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_imports_follow_the_order(path):
    me = room(module_name(path))
    if me == "__init__":
        return  # the public names are loaded lazily, from everywhere
    wrong = []
    for line, name in imports(path):
        if name.split(".")[0] == "convert":
            wrong.append(f"line {line}: {name} (say mm1_mlx.convert, or relative)")
        if name.split(".")[0] != "mm1_mlx":
            continue
        other = room(name)
        if other == "__init__" or other == me:
            continue
        if RANK[other] >= RANK[me]:
            wrong.append(f"line {line}: {name} ({other} does not stand before {me})")
    assert not wrong, "\n".join([f"{path.relative_to(ROOT)}:", *wrong])


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_foreign_frameworks_stay_in_their_place(path):
    place = str(path.relative_to(ROOT).as_posix())
    for line, name in imports(path):
        allowed = FOREIGN.get(name.split(".")[0])
        if allowed is not None and not place.startswith(tuple(allowed) or ("\0",)):
            pytest.fail(f"{place}:{line} imports {name}")


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_public_modules_classes_and_functions_say_what_they_give(path):
    tree = parsed(path)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [
        node
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    missing += [node.name for node in public if not ast.get_docstring(node)]
    if room(module_name(path)) == "DOORS":  # every door has the same three
        missing = [name for name in missing if name not in ("parser", "run", "main")]
    assert not missing, f"{path.relative_to(ROOT)}: no docstring on {missing}"


@pytest.mark.parametrize("path", FILES, ids=PATHS)
def test_files_and_functions_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines < 500, f"{path.relative_to(ROOT)} has {lines} lines"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length < 60, f"{path.name}: {node.name} has {length} lines"


LIBRARY_ONLY = [path for path in FILES if room(module_name(path)) not in ("DOORS",)]


@pytest.mark.parametrize(
    "path", LIBRARY_ONLY, ids=[str(path.relative_to(ROOT)) for path in LIBRARY_ONLY]
)
def test_the_library_never_prints(path):
    place = path.relative_to(ROOT).as_posix()
    if place.startswith("mm1_mlx/cli/") or place == "convert/__main__.py":
        return  # the doors' own room and a door
    tree = parsed(path)
    calls = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls, f"{place}: print in line {calls}"


def test_absolute_imports_in_the_library_and_relative_ones_in_convert():
    for path in FILES:
        inside = path.relative_to(ROOT).parts[0] == "convert"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                if not inside:
                    assert node.level == 0, f"{path}:{node.lineno} is relative"
                elif (node.module or "").startswith("mm1_mlx.convert"):
                    pytest.fail(f"{path}:{node.lineno}: relative inside convert/")


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in FILES}
    missing = [str(f) for f in folders if not (f / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}: it would not be installed"


def test_every_module_at_the_root_is_a_leaf_or_a_door():
    from mm1_mlx.cli.doors import DOORS

    doors = {module.split(".")[1] for module, _ in DOORS.values()} - {"convert"}
    found = {path.stem for path in (ROOT / "mm1_mlx").glob("*.py")}
    assert found <= LEAVES | doors | {"__main__"}


def test_an_old_python_can_read_what_it_meets_first():
    for name in ("setup.py", "mm1_mlx/__init__.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        ast.parse(text, name, feature_version=(3, 8))


# --- the comparison that all parity tests trust ---


def test_assert_close_refuses_unequal_shapes():
    with pytest.raises(pytest.fail.Exception, match=r"\(1, 3\), expected \(3,\)"):
        assert_close(np.zeros((1, 3)), np.zeros(3), atol=1.0)


def test_assert_close_names_the_largest_difference_and_its_place():
    actual = np.zeros((2, 3), np.float32)
    expected = actual.copy()
    expected[0, 1], expected[1, 2] = 0.1, 0.5
    with pytest.raises(pytest.fail.Exception, match=r"2 of 6 .* 5.000e-01 at \(1, 2\)"):
        assert_close(actual, expected, atol=0.05)
    assert_close(actual, expected, atol=0.5)


@pytest.mark.parametrize("actual, expected", [(np.nan, 1.0), (1.0, np.nan)])
def test_assert_close_refuses_a_nan_on_one_side(actual, expected):
    with pytest.raises(pytest.fail.Exception, match="not finite on one side"):
        assert_close(np.array([actual]), np.array([expected]), atol=1e9)


def test_assert_close_takes_equal_infinities_and_nans():
    values = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert_equal(values, values.copy())
    with pytest.raises(pytest.fail.Exception, match="not finite"):
        assert_equal(values, -values)


def test_assert_close_compares_mlx_with_numpy():
    import mlx.core as mx

    assert_close(mx.array([1.0, 2.0], mx.bfloat16), np.array([1.0, 2.0]), atol=0)
    with pytest.raises(pytest.fail.Exception, match=r"largest difference 1\.000e"):
        assert_equal(mx.array([1, 2]), mx.array([1, 3]))


def test_relative_tolerance_is_of_the_expected_value():
    assert_close(np.array([110.0]), np.array([100.0]), atol=0, rtol=0.1)
    with pytest.raises(pytest.fail.Exception):
        assert_close(np.array([100.0]), np.array([110.0]), atol=0, rtol=0.09)


def test_no_test_is_skipped_unseen():
    """helpers.need fails where .ci/run promises a package; importorskip never does."""
    files = [
        path for path in (ROOT / "tests").rglob("*.py") if path.name != "helpers.py"
    ]
    call = "importorskip" + "("
    wrong = [p.name for p in files if call in p.read_text(encoding="utf-8")]
    assert not wrong, f"use helpers.need in {wrong}"


@pytest.mark.parametrize("promised", [False, True])
def test_a_missing_package_is_a_skip_at_home_and_a_failure_in_ci(monkeypatch, promised):
    monkeypatch.setenv("MM1_REQUIRE_PARITY", str(int(promised)))
    outcome = pytest.fail.Exception if promised else pytest.skip.Exception
    with pytest.raises(outcome, match="needs no_such_package"):
        need("no_such_package")
    assert needs("no_such_package").args == (not promised,)
    assert needs("numpy").args == (False,)
