"""What mm1_mlx is, what it needs, and how its two source folders are installed."""

# Kept readable for old Pythons: the first thing that the system Python of a Mac (3.9)
# or an x86 Python sees of this project is this file.

import platform
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def refuse_unusable_macs():
    """Say what is wrong before pip says "no matching distribution found for mlx"."""
    if sys.platform != "darwin":
        return
    if platform.machine() == "x86_64":
        sys.exit(
            f"error: this is an x86 Python ({sys.executable}), but MLX needs an Apple "
            "silicon Mac and an arm64 Python. On such a Mac, make the virtual "
            "environment with one: brew install python, or python.org's installer."
        )
    version = platform.mac_ver()[0].split(".")
    # 10 is what an old Python reports for any newer system, so it tells nothing.
    if version[0].isdigit() and 10 < int(version[0]) < 14:
        found = ".".join(version)
        sys.exit(f"error: this Mac has macOS {found}, but MLX needs macOS 14 or newer.")


def version():
    text = (ROOT / "mm1_mlx" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


refuse_unusable_macs()

# convert/ stands beside the library in the source tree, but no package of that bare
# name may land in a user's environment.
packages = find_packages(include=["mm1_mlx", "mm1_mlx.*"])
packages += ["mm1_mlx." + name for name in find_packages(include=["convert*"])]

setup(
    name="mm1_mlx",
    version=version(),
    description="MM1, Apple's multimodal models, in MLX: answer, train, convert",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=packages,
    package_dir={"mm1_mlx.convert": "convert"},
    package_data={"mm1_mlx": ["py.typed", "assets/*/*"]},
    zip_safe=False,
    entry_points={
        "console_scripts": ["mm1_mlx = mm1_mlx.__main__:main"],
        # Read by lmms-eval only, where it is installed.
        "lmms_eval.models": ["mm1_mlx = mm1_mlx.evaluation.lmms_plugin:manifest"],
    },
    # What `generate` needs for any model: the embedded one must answer after this.
    install_requires=[
        # On Linux a back end is chosen by an extra: its CPU and CUDA wheels exclude
        # each other. On a Mac mlx brings Metal along.
        "mlx>=0.32",
        "numpy>=1.26",
        "pillow>=10.3",
        "jinja2>=3.1",  # chat templates
        "sentencepiece>=0.2",  # tokenizer.model; mm1-tiny's own
        "tokenizers>=0.20",  # tokenizer.json; brings huggingface-hub for hub ids
    ],
    extras_require={
        "cpu": ["mlx[cpu]"],
        "cuda12": ["mlx[cuda12]"],
        "cuda13": ["mlx[cuda13]"],
        "heic": ["pillow-heif>=0.18"],
        "video": ["av>=14"],  # frames of mp4, mov, webm; it brings FFmpeg's libraries
        # The digits, the photographs and the fonts that mm1-tiny learns from, mlx-lm's
        # learned quantization; curves, --config, a bar, and parquet files.
        "train": [
            "scikit-learn>=1.5",
            "scikit-image>=0.24",
            "matplotlib>=3.9",
            "mlx-lm>=0.32",
            "pyyaml>=6",
            "tqdm>=4.66",
            "pyarrow>=15",  # datasets in parquet files
        ],
        # Enough for the tests; those against a reference skip without `parity`.
        "test": [
            "pytest>=8.2",
            "pytest-xdist>=3.7",  # `pytest -n 2`: two processes, half of the time
        ],
        # The references. Install a CPU torch first: on Linux the default one brings
        # several GB of CUDA along. CONTRIBUTING.md has the commands.
        "parity": [
            "torch>=2.5",
            "transformers>=5.7",
            "tamm>=0.2",
            "peft>=0.21",  # adapters; brings accelerate
            "mlx-lm>=0.32",
            "scikit-learn>=1.5",
            "scikit-image>=0.24",
            "matplotlib>=3.9",
            "skia-python>=87",  # draws test pictures that training never saw
            "tiktoken>=0.7",
            "av>=14",  # films
            "pyarrow>=15",
        ],
        "dev": ["ruff>=0.15", "pyright[nodejs]>=1.1.400", "pre-commit>=4"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
