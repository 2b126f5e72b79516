"""MM1 in MLX: a model that answers questions about pictures.

    from mm1_mlx import load, generate

    model, processor = load("mm1-tiny")
    print(generate(model, processor, "What is this?", images=["shapes.png"]))

The names below are loaded when they are first used, so that importing the package is
instant and `--help` needs no MLX.
"""

import os
import sys

# Checked before anything that an older Python cannot read, so this file keeps to
# syntax that it can. `name` lets `python -m` say it in one line.
if sys.version_info < (3, 11):  # noqa: UP036 - a clone can be run without an install
    raise ImportError(
        "mm1_mlx needs Python 3.11 or newer, but this is Python "
        + ".".join(str(part) for part in sys.version_info[:3])
        + " ("
        + str(sys.executable)
        + "). Make the virtual environment with a newer one, such as python3.12.",
        name="mm1_mlx",
    )

from mm1_mlx._version import __version__

# In a clone that is not installed (or whose plain install is hidden by the clone's own
# folder) mm1_mlx.convert is the folder beside this one. An install has it inside.
_BESIDE = os.path.dirname(__path__[0])
if os.path.isfile(os.path.join(_BESIDE, "setup.py")) and os.path.isdir(
    os.path.join(_BESIDE, "convert")
):
    __path__.append(_BESIDE)

TYPE_CHECKING = False  # importing typing for it takes longer than all the rest here
if TYPE_CHECKING:
    from mm1_mlx.adapters.switch import Adapters, drop_adapter, use_adapter
    from mm1_mlx.config import MM1Config
    from mm1_mlx.config_boxes import BoxFormat
    from mm1_mlx.errors import MM1Error
    from mm1_mlx.evaluation.runner import evaluate
    from mm1_mlx.inference.conversation import Conversation
    from mm1_mlx.inference.features import image_features
    from mm1_mlx.inference.few_shot import FewShot
    from mm1_mlx.inference.generation import (
        GenerationResponse,
        batch_generate,
        generate,
        stream_generate,
    )
    from mm1_mlx.inference.reuse import Reuse
    from mm1_mlx.inputs.boxes import Region, boxes_of, with_boxes
    from mm1_mlx.inputs.drawing import draw_boxes
    from mm1_mlx.inputs.processor import Processor
    from mm1_mlx.inputs.video import video_frames
    from mm1_mlx.loading import damage_report, load, load_adapters, quantize, save
    from mm1_mlx.models.mm1 import MM1

__all__ = [
    "MM1",
    "Adapters",
    "BoxFormat",
    "Conversation",
    "FewShot",
    "GenerationResponse",
    "MM1Config",
    "MM1Error",
    "Processor",
    "Region",
    "Reuse",
    "__version__",
    "batch_generate",
    "boxes_of",
    "damage_report",
    "draw_boxes",
    "drop_adapter",
    "evaluate",
    "generate",
    "image_features",
    "load",
    "load_adapters",
    "quantize",
    "save",
    "stream_generate",
    "use_adapter",
    "video_frames",
    "with_boxes",
]

# Where each public name lives. A verb that is also a door (`generate`) is here as the
# verb; see mm1_mlx/cli/verbs.py for how both share the name.
_HOMES = {
    "MM1": "mm1_mlx.models.mm1",
    "Adapters": "mm1_mlx.adapters.switch",
    "BoxFormat": "mm1_mlx.config_boxes",
    "Conversation": "mm1_mlx.inference.conversation",
    "MM1Config": "mm1_mlx.config",
    "MM1Error": "mm1_mlx.errors",
    "FewShot": "mm1_mlx.inference.few_shot",
    "GenerationResponse": "mm1_mlx.inference.generation",
    "Processor": "mm1_mlx.inputs.processor",
    "Region": "mm1_mlx.inputs.boxes",
    "Reuse": "mm1_mlx.inference.reuse",
    "batch_generate": "mm1_mlx.inference.generation",
    "evaluate": "mm1_mlx.evaluation.runner",
    "generate": "mm1_mlx.inference.generation",
    "boxes_of": "mm1_mlx.inputs.boxes",
    "image_features": "mm1_mlx.inference.features",
    "damage_report": "mm1_mlx.loading",
    "draw_boxes": "mm1_mlx.inputs.drawing",
    "drop_adapter": "mm1_mlx.adapters.switch",
    "load": "mm1_mlx.loading",
    "load_adapters": "mm1_mlx.loading",
    "quantize": "mm1_mlx.loading",
    "save": "mm1_mlx.loading",
    "stream_generate": "mm1_mlx.inference.generation",
    "use_adapter": "mm1_mlx.adapters.switch",
    "with_boxes": "mm1_mlx.inputs.boxes",
    "video_frames": "mm1_mlx.inputs.video",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mm1_mlx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
