"""The parts of a model that can be trained. Only plain Python here."""

from mm1_mlx.quantization.recipes import PARTS as MATRICES
from mm1_mlx.quantization.recipes import part_of

# What can be trained, in the order in which it is shown. "router" and "norms" have no
# matrices for pairs: whole or not at all.
PARTS = (*MATRICES, "router", "norms")


def part_of_weight(name: str) -> str:
    """The part that a weight of a model belongs to, of PARTS.

    What is beside a part's matrices (biases, position tables, convolutions) belongs to
    "encoder" and "connector" there, and to "norms" in the decoder. What a packed weight
    is made of is of its part.
    """
    where = name.partition(".")[0]
    if where == "vision":
        return "encoder"
    if where in ("connector", "tile_connector", "image_newline"):
        return "connector"
    name = name.replace(".base.", ".")  # inside an adapted layer
    for ending in (".bias", "_bias", ".scales", ".biases"):
        name = name.removesuffix(ending)
    name = name if name.endswith(".weight") else name + ".weight"
    if name.endswith(("router.weight", "shared_expert_gate.weight")):
        return "router"
    return part_of(name) or "norms"
