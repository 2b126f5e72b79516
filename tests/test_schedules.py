"""Learning rates: MM1's law and schedule, by hand."""

import pytest

from mm1_mlx.training.schedules import mm1_learning_rate, warmup_cosine


@pytest.mark.parametrize(
    "parameters, rate",
    [(1.2e9, 8.58e-5), (2.9e9, 5.92e-5), (6.4e9, 4.24e-5), (30e9, 2.21e-5)],
)
def test_the_law_gives_the_rates_of_the_paper(parameters, rate):
    # Three digits, as the formula's values are listed (MM1 section 4 rounds further).
    assert mm1_learning_rate(parameters) == pytest.approx(rate, abs=0.005e-5)


def test_warm_up_is_linear_and_the_cosine_ends_at_its_floor():
    def rate(step):
        return warmup_cosine(step, total=110, peak=2.0, warmup=10, floor=0.1)

    assert rate(0) == pytest.approx(0.2)
    assert rate(4) == pytest.approx(1.0)
    assert rate(9) == rate(10) == pytest.approx(2.0)
    assert rate(35) == pytest.approx(2 * (0.1 + 0.9 * (0.5 + 0.5**1.5)))  # cos 45
    assert rate(60) == pytest.approx(2 * 0.55)  # half of the way
    assert rate(110) == rate(500) == pytest.approx(0.2)


def test_the_cosine_never_rises_and_warm_up_never_falls():
    rates = [warmup_cosine(s, 200, 1.0, 20) for s in range(201)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_no_warm_up_and_nothing_but_warm_up():
    assert warmup_cosine(0, 10, 3.0, 0) == pytest.approx(3.0)
    assert warmup_cosine(9, 10, 3.0, 10) == pytest.approx(3.0)
    assert warmup_cosine(2, 10, 3.0, 100) == pytest.approx(0.09)
