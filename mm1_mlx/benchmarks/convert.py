"""What a conversion takes: memory beside mapped files, and time beside a file copy.

A synthetic Llama of any size is written in shards, converted to 4 bits and to 16 bits,
and copied; all of it in the same run on the same disk, each with fsync.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.checkpoint.writer import Slot, WeightWriter
from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import MM1Error
from mm1_mlx.memory import decoder_shapes

GIB = 2**30
_SHARD = 2_000_000_000
_WIDTH, _HIDDEN, _VOCAB = 4096, 11008, 32000
_LAYER = 4 * _WIDTH**2 + 3 * _WIDTH * _HIDDEN  # parameters


@dataclass(frozen=True)
class Job:
    """One measured piece of work.

    seconds: wall time with fsync. anonymous: largest RssAnon in bytes, 0 where the
    system does not tell. written: bytes.
    """

    name: str
    seconds: float
    anonymous: int
    written: int


def synthetic(folder: Path, nbytes: int, tell: Callable[[str], None]) -> int:
    """A Llama-shaped bfloat16 checkpoint of about `nbytes`; the bytes it has."""
    embeddings = 2 * 2 * _WIDTH * _VOCAB
    layers = max(round((nbytes - embeddings) / (2 * _LAYER)), 1)
    config = DecoderConfig(
        hidden_size=_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=32,
        intermediate_size=_HIDDEN,
        vocab_size=_VOCAB,
    )
    slots = [
        Slot(name, "BF16", shape)
        for ours, full in dict(decoder_shapes(config)).items()
        for name, shape in _llama_names(ours, full)
    ]
    values = {
        "model_type": "llama",
        "hidden_size": _WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "intermediate_size": _HIDDEN,
        "vocab_size": _VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tell(f"writing a checkpoint of {sum(s.nbytes for s in slots) / 1e9:.1f} GB")
    rng = np.random.default_rng(0)
    # Numbers near 0.02, as bits of bfloat16; one block over and over.
    block = (0x3C00 + rng.integers(0, 0x200, 1 << 22)).astype(np.uint16)
    block |= rng.integers(0, 2, block.size).astype(np.uint16) << 15
    with WeightWriter(folder, slots, _SHARD) as writer:
        for slot in slots:
            left = slot.nbytes // 2
            while left:
                writer.add(slot.name, block[: min(left, block.size)])
                left -= min(left, block.size)
    return sum(slot.nbytes for slot in slots)


def _llama_names(
    ours: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if ours.startswith("lm_head"):
        yield ours, shape
        return
    name = "model." + ours.replace("norm1", "input_layernorm").replace(
        "norm2", "post_attention_layernorm"
    ).replace(".attn.", ".self_attn.")
    if "qkv_proj" in name:
        for letter in "qkv":
            yield name.replace("qkv", letter), (shape[0] // 3, shape[1])
    elif "gate_up_proj" in name:
        for half in ("gate", "up"):
            yield name.replace("gate_up", half), (shape[0] // 2, shape[1])
    else:
        yield name, shape


def measure_convert(
    folder: Path,
    nbytes: int,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Job]:
    """Write the checkpoint, copy it, convert it to 16 and to 4 bits; in `folder`.

    Needs about three times `nbytes` of disk; everything but what was there before is
    removed by the caller. Raises MM1Error where a command fails.
    """
    source = folder / "source"
    size = synthetic(source, nbytes, tell)
    jobs = []
    tell("copying it")
    jobs.append(_copy(source, folder / "copy", size))
    for name, flags in (("16 bit", []), ("4 bit", ["-q"])):
        tell(f"converting it to {name}")
        out = folder / name.replace(" ", "-")
        jobs.append(_convert(source, out, name, flags))
    return jobs


def _copy(source: Path, out: Path, size: int) -> Job:
    """A plain copy of the weight files, on the disk when it ends."""
    out.mkdir()
    start = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as reader, (out / path.name).open("wb") as writer:
            while block := reader.read(16 << 20):
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
    return Job("file copy", time.perf_counter() - start, 0, size)


def _convert(source: Path, out: Path, name: str, flags: list[str]) -> Job:
    command = [sys.executable, "-m", "mm1_mlx.convert"]
    command += ["--hf-path", str(source), "--mlx-path", str(out), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with _watching(process.pid) as seen:
        _, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise MM1Error(f"The conversion failed: {errors.decode()[-300:]}")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Job(name, seconds, max(seen, default=0), written)


@contextmanager
def _watching(pid: int) -> Iterator[list[int]]:
    """Samples of a process's anonymous memory, 50 a second."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if (found := anonymous_memory(pid)) is not None:
                seen.append(found)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def anonymous_memory(pid: int) -> int | None:
    """Bytes of a process that are no file's pages (RssAnon); None where unknown."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def as_object(jobs: list[Job]) -> dict[str, Any]:
    """For JSON: every job, and the ratios that the goals are about."""
    by_name = {job.name: job for job in jobs}
    copy, same = by_name["file copy"], by_name["16 bit"]
    return {
        "jobs": [vars(job) for job in jobs],
        "speed_of_16_bit_over_copy": copy.seconds / same.seconds,
        "peak_anonymous_gib": max(job.anonymous for job in jobs) / GIB,
    }


def as_table(jobs: list[Job]) -> str:
    """For people."""
    lines = [f"{'job':<12}{'seconds':>9}{'GB/s read':>11}{'RssAnon':>12}"]
    size = jobs[0].written
    for job in jobs:
        memory = f"{job.anonymous / GIB:.2f} GiB" if job.anonymous else "-"
        speed = size / 1e9 / job.seconds
        lines.append(f"{job.name:<12}{job.seconds:>9.1f}{speed:>11.2f}{memory:>12}")
    ratio = as_object(jobs)["speed_of_16_bit_over_copy"]
    lines.append(f"16 bit to 16 bit goes at {ratio:.2f} of the speed of a file copy")
    return "\n".join(lines)
