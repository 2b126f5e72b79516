"""MM1 in PyTorch, of any of our configurations, under our own names.

The other side of `verify` for what neither transformers nor its authors' code can run
here: an MM1 trained in PyTorch, Apple's tamm, AIM. Written from the papers and the
originals, not from mm1_mlx.models, and plain: every expert sees every token, attention
is written out by torch. Whoever trains an MM1 in PyTorch may start from it: what
`state_dict()` gives is what the source mm1_torch reads.
"""

from .connector import Connector
from .decoder import Decoder
from .encoder import Encoder

__all__ = ["Connector", "Decoder", "Encoder"]
