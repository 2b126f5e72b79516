"""Runs that explode: told from noise, stopped, and gone on with."""

import math
import random

import pytest
from test_resuming import run
from test_tuning import PLAN, data
from training_kit import uncompiled

from mm1_mlx.adapters.targets import Plan, Target
from mm1_mlx.errors import MM1Error
from mm1_mlx.training.divergence import Divergence

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)
assert data  # a fixture
KEPT = ("tune.safetensors", "adapters.safetensors")


def test_noise_is_not_divergence():
    """Up to four times the loss of a uniform guess, whatever came before."""
    watch, rng, words = Divergence(32000), random.Random(0), 32000
    for _ in range(2000):
        assert watch.said(abs(rng.gauss(0.1, 3.0))) == ""
        assert watch.said(4 * math.log(words)) == ""


def test_a_run_that_begins_high_may_come_down():
    watch = Divergence(350)
    assert all(watch.said(loss) == "" for loss in (900.0, 500.0, 80.0, 6.0, 40.0))


def test_an_explosion_is_said():
    watch = Divergence(350)
    for _ in range(5):
        assert watch.said(2.0) == ""
    assert watch.said(23.9) != "" and 4 * math.log(350) < 23.9
    assert watch.said(19.9) == ""  # below 4 ln(V)
    assert "gave the loss 900 after a mean of" in watch.said(900.0)


def test_what_it_has_no_measure_for():
    """The encoder's stage of pretraining has no vocabulary, and no such loss."""
    assert Divergence(None).said(1e9) == ""
    assert Divergence(350).said(None) == ""


@pytest.mark.parametrize("rate, said", [(300.0, r"the loss \d+\S* after"), (1e30, "")])
def test_an_exploding_run_keeps_its_last_good_checkpoint(data, tmp_path, rate, said):
    """One is saved after every step, but not with the weights that exploded."""
    out = tmp_path / "run"
    plan = Plan(parts={"head": Target(), **PLAN.parts})
    more = {"plan": plan, "optimizer": "sgd", "clip": 1e9, "warmup": 0}
    more |= {"save_every": 1}
    run(data, out, until=3, learning_rate=1e-3, **more)
    before = {name: (out / name).read_bytes() for name in KEPT}
    message = (
        rf"Step 4 gave {said}.* so the run has stopped\. Its samples: .*train\.jsonl, "
        r"line \d+.* The checkpoint of step 3 is whole\. Lower the learning rate"
    )
    more |= {"resume": True, "force": True}
    with pytest.raises(MM1Error, match=message):
        run(data, out, learning_rate=rate, **more)
    assert before == {name: (out / name).read_bytes() for name in KEPT}
    _, metrics = run(data, out, learning_rate=1e-3, **more)
    assert len(metrics) == 3 and all(told["text"] < 8 for told in metrics)
