"""Two groups are found where there are two, and none where there is one."""

import numpy as np
import pytest

from noisefit.method.modes import otsu, part

pytestmark = pytest.mark.slow


def one_mode(rng, name, count):
    draw = {
        "normal": lambda: rng.normal(-6, 1, count),
        "exponential": lambda: -rng.exponential(size=count),
        "gamma": lambda: -rng.gamma(3, size=count),
        "log-normal": lambda: -rng.lognormal(size=count),
    }
    return draw[name]()


@pytest.mark.parametrize("name", ["normal", "exponential", "gamma", "log-normal"])
def test_one_mode_is_seldom_taken_for_two(name):
    rng = np.random.default_rng(0)
    found = [part(one_mode(rng, name, 300)).threshold for _ in range(10)]
    assert sum(threshold is not None for threshold in found) <= 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_two_groups_part_between_them(share):
    rng = np.random.default_rng(1)
    for _ in range(5):
        low = int(600 * share)
        unknown, known = -rng.gamma(30, 0.3, low), -rng.exponential(0.3, 600 - low)
        threshold = part(np.concatenate([known, unknown])).threshold
        wrong = (unknown >= threshold).sum() + (known < threshold).sum()
        assert wrong <= 6  # of 600


def test_the_cut_is_otsus():
    """Against all cuts, by the variances within the two sides."""
    rng = np.random.default_rng(2)
    x = np.sort(np.concatenate([rng.normal(0, 1, 30), rng.normal(4, 2, 21)]))
    within = [cut * x[:cut].var() + (len(x) - cut) * x[cut:].var() for cut in range(1, len(x))]
    cut = 1 + int(np.argmin(within))
    assert otsu(x) == pytest.approx((x[cut - 1] + x[cut]) / 2)


def test_few_values_and_values_all_the_same():
    assert "too few" in part(np.array([-1.0, -9.0])).why
    assert "as well as each other" in part(np.full(50, -2.0)).why
    assert part(np.repeat([-0.1, -8.0], 40)).threshold == pytest.approx(-2.47, abs=0.1)


def test_many_values_part_as_a_sample_of_them():
    rng = np.random.default_rng(3)
    values = np.concatenate([-rng.gamma(30, 0.3, 4000), -rng.exponential(0.3, 12000)])
    threshold = part(values).threshold
    assert (values[:4000] < threshold).mean() > 0.99 and (values[4000:] >= threshold).mean() > 0.99
