"""What a run cost: the lines that users of mlx-lm and mlx-vlm know, and one object."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm1_mlx.inference.generation import GenerationResponse

# The fields of the JSON object that are taken over as they are.
_FIELDS = (
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "reused_tokens",
    "prompt_tps",
    "generation_tokens",
    "generation_tps",
    "drafted_tokens",
    "accepted_tokens",
    "ttft",
    "num_images",
    "image_sizes",
    "image_tokens",
    "image_tiles",
    "image_seconds",
    "peak_memory",
)


def statistics(response: "GenerationResponse") -> str:
    """The block for stderr.

    Scripts read the lines Prompt, Generation and Peak memory, so these keep the words
    of mlx-lm. The decode rate leaves out the first token, which the prompt paid for, so
    an answer of one token has none.
    """
    generation = f"Generation: {response.generation_tokens} tokens"
    if not math.isnan(response.generation_tps):
        generation += f", {response.generation_tps:.3f} tokens-per-sec"
    lines = ["=" * 10]
    if response.image_sizes:
        sizes = ", ".join(f"{width}x{height}" for width, height in response.image_sizes)
        tiles = response.image_tiles
        cut = f" in {tiles} tiles" if tiles > response.num_images else ""
        lines.append(
            f"Image: {response.num_images}{cut} ({sizes}), "
            f"{response.image_tokens} tokens, encode {response.image_seconds:.2f} s"
        )
    if response.reused_tokens:
        reused = f"{response.reused_tokens} of {response.prompt_tokens}"
        lines.append(f"Reused: {reused} prompt tokens")
    lines += [
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec",
        generation,
        *_drafts(response),
        f"TTFT: {response.ttft:.2f} s",
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    return "\n".join(lines)


def _drafts(response: "GenerationResponse") -> list[str]:
    if response.drafted_tokens is None:
        return []
    right, all_ = response.accepted_tokens, response.drafted_tokens
    return [f"Draft: {right} of {all_} tokens accepted"]


def as_json(response: "GenerationResponse", **more: Any) -> str:
    """One JSON object on one line: the whole answer, its statistics, and `more`."""
    import json

    values = {name: getattr(response, name) for name in _FIELDS} | more
    # A rate of one token is not a number; JSON has no NaN.
    values = {k: None if v != v else v for k, v in values.items()}
    return json.dumps(values, ensure_ascii=False)
