"""Learning rates over a run."""

import math


def mm1_learning_rate(parameters: int) -> float:
    """MM1's law for the peak rate: exp(-0.4214 ln N - 0.5535) (section 4).

    parameters: N, taken as the decoder's without embeddings (our reading). Fitted by
    the paper on 9M to 1.2B.
    """
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


def warmup_cosine(
    step: int, total: int, peak: float, warmup: int, floor: float = 0.1
) -> float:
    """Linear to `peak` in `warmup` steps, then cosine to floor * peak at `total`.

    MM1: 2000 steps of warm-up, cosine to 10% at 200k (section 4).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
