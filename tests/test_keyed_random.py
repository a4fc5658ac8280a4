"""The keyed generator: an independent SplitMix64, pinned draws, moments, and independence of everything else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_peft.keyed_random import derive, fresh_keys, normal, sample_keys, uniform

DTYPES = [torch.float32, torch.float64]
DRAWS = {"uniform": uniform, "normal": normal}

PINNED_KEYS = [6870230651440121881, -588296918997077003, -7816302006007245891]
PINNED_DERIVED = [3378508988871321613, -3315638651304877543, -6707838531780457270]
PINNED_UNIFORM = [
    [0.6687176823616028, 0.015199065208435059, 0.08193868398666382],
    [0.7606698274612427, 0.8689975738525391, 0.07192128896713257],
    [0.4779930114746094, 0.379452645778656, 0.5550377368927002],
]
PINNED_UNIFORM_64 = [
    [0.6687176914293395, 0.015199113606110481],
    [0.7606698452028212, 0.8689975745809778],
    [0.4779930704040043, 0.3794526682452676],
]
PINNED_NORMAL = [[1.293777, 0.061275], [1.521351, 1.80745], [-1.072739, -0.30607]]


def mix(x: int) -> int:
    """SplitMix64's finalizer as published, on Python integers."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def keys_of(count: int) -> Tensor:
    return sample_keys(0, 0, torch.arange(count))


@pytest.mark.parametrize("key", [0, 1, -1, 12345678901234567, 2**63 - 1, -(2**63)])
def test_uniform_is_splitmix64(key: int) -> None:
    state = mix(key)
    words = [mix(state + (i + 1) * 0x9E3779B97F4A7C15) for i in range(5)]
    found = uniform(torch.tensor([key]), (5,), torch.float64)[0]
    # Every number here is a float64 without rounding, so the comparison is exact.
    assert found.tolist() == [(word >> 11) * 2.0**-53 for word in words]
    halves = [word >> 40 for word in words] + [word & 0xFFFFFF for word in words]
    assert uniform(torch.tensor([key]), (10,))[0].tolist() == [half * 2.0**-24 for half in halves]


@pytest.mark.parametrize("numbers", [(0,), (1, 2, 3), (-1,), (2**63, -(2**63) - 1), (2**70 + 3,)])
def test_derive_is_splitmix64(numbers: tuple[int, ...]) -> None:
    for key in (0, 7, -(2**63)):
        expected = key
        for number in numbers:
            expected = mix(mix(expected + 0x9E3779B97F4A7C15) ^ (number % 2**64))
        assert derive(torch.tensor([key]), *numbers).item() % 2**64 == expected


def test_pinned_draws() -> None:
    """A change of the generator would let a resumed run see other numbers than the interrupted one."""
    keys = sample_keys(1, 2, torch.tensor([0, 3, 50_000]))
    assert keys.tolist() == PINNED_KEYS
    assert derive(keys, 1).tolist() == PINNED_DERIVED
    assert uniform(keys, (3,)).tolist() == PINNED_UNIFORM
    assert uniform(keys, (2,), torch.float64).tolist() == PINNED_UNIFORM_64
    # log and cos may differ in the last bits between builds of torch.
    torch.testing.assert_close(normal(keys, (2,)), torch.tensor(PINNED_NORMAL), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_moments_and_range(dtype: torch.dtype) -> None:
    draws = uniform(keys_of(400), (20, 25), dtype)
    assert draws.shape == (400, 20, 25) and draws.dtype == dtype
    assert draws.min() >= 0 and draws.max() < 1
    count = draws.numel()
    # Five standard errors of each estimate: of u^k the variance is 1/(2k+1) - 1/(k+1)^2.
    for power in (1, 2, 3, 4):
        spread = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / count)
        assert abs((draws.double() ** power).mean().item() - 1 / (power + 1)) < 5 * spread
    # 16 bins: the 1 - 1e-6 quantile of chi^2 with 15 degrees of freedom is 56.5.
    bins = torch.histc(draws.float().flatten(), 16, 0, 1)
    assert ((bins - count / 16) ** 2 / (count / 16)).sum() < 56.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_moments(dtype: torch.dtype) -> None:
    draws = normal(keys_of(400), (20, 25), dtype)
    assert draws.shape == (400, 20, 25) and draws.dtype == dtype
    assert draws.isfinite().all()
    count = draws.numel()
    # Moments 0, 1, 0, 3 with variances E x^2k - (E x^k)^2 = 1, 2, 15, 96; five standard errors.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((draws.double() ** power).mean().item() - moment) < 5 * math.sqrt(variance / count)
    # The share beyond two standard deviations is 0.0455.
    assert abs((draws.abs() > 2).double().mean().item() - 0.0455) < 5 * math.sqrt(0.0455 / count)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5)])
def test_rows_do_not_depend_on_the_batch(draw: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    keys = keys_of(33)
    whole = DRAWS[draw](keys, shape, dtype)
    assert whole.shape == (33, *shape)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    repeated = torch.tensor([4, 4, 32, 0, 4])
    # A vectorised logarithm may round otherwise at the end of a batch, hence a tolerance for the normal numbers.
    close = dict(rtol=0, atol=0) if draw == "uniform" else dict(rtol=1e-5, atol=1e-6)
    for chosen in (order, repeated, torch.arange(5), torch.arange(32, 33), torch.arange(0)):
        torch.testing.assert_close(DRAWS[draw](keys[chosen], shape, dtype), whole[chosen], **close)


def test_draws_ignore_and_leave_torchs_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = uniform(keys_of(5), (6,)), normal(keys_of(5), (6,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first[0], uniform(keys_of(5), (6,)))
    assert torch.equal(first[1], normal(keys_of(5), (6,)))


STREAM_KEYS = {
    "sample keys": sample_keys(3, 4, torch.arange(200)),
    "counting": torch.arange(200),
    # Starts that lie on one SplitMix64 sequence: without mixing the key, each row would be its neighbour, shifted.
    "on one sequence": torch.arange(200) * -7046029254386353131,
    "high bits": torch.arange(200) << 56,
    "negative": -torch.arange(200),
    "derived": derive(torch.tensor([5]).expand(200), 0) + torch.arange(200),
}


@pytest.mark.parametrize("name", STREAM_KEYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_of_samples_are_uncorrelated(name: str, dtype: torch.dtype) -> None:
    keys, length = STREAM_KEYS[name], 1500
    draws = uniform(keys, (length,), dtype).double()
    centred = (draws - 0.5) / math.sqrt(1 / 12)
    for lag in (0, 1, 2):
        ahead, behind = centred[:, lag:], centred[:, : length - lag]
        correlations = ahead @ behind.T / (length - lag)
        if lag == 0:
            correlations.fill_diagonal_(0)
        # 40,000 estimates of standard error 1/sqrt(n): one beyond six of them has a chance of 1e-4.
        assert correlations.abs().max() < 6 / math.sqrt(length - lag), lag


@pytest.mark.parametrize("name", STREAM_KEYS)
def test_streams_of_samples_do_not_overlap(name: str) -> None:
    # 300,000 draws of 53 bits: two alike by chance with probability 5e-6.
    draws = uniform(STREAM_KEYS[name], (1500,), torch.float64)
    assert len(draws.unique()) == draws.numel()


def test_one_streams_draws_are_uncorrelated() -> None:
    """Columns rather than rows: what one image's pixels have to do with each other."""
    draws = (uniform(keys_of(3000), (60,), torch.float32).double() - 0.5) / math.sqrt(1 / 12)
    correlations = (draws.T @ draws / 3000).fill_diagonal_(0)
    # 3,600 estimates, six standard errors: chance 1e-5.
    assert correlations.abs().max() < 6 / math.sqrt(3000)


def test_purposes_are_independent() -> None:
    keys = keys_of(2000)
    purposes = [
        keys,
        *(derive(keys, number) for number in (0, 1, 2, -1, 2**63)),
        derive(keys, 0, 1),
        derive(keys, 1, 0),
    ]
    assert len(torch.cat(purposes).unique()) == 2000 * len(purposes)
    draws = torch.stack([uniform(purpose, (3,)).flatten() for purpose in purposes]).double()
    centred = (draws - 0.5) / math.sqrt(1 / 12)
    correlations = (centred @ centred.T / draws.shape[1]).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / math.sqrt(draws.shape[1])  # 64 estimates, six standard errors


def test_sample_keys_are_distinct_over_seeds_steps_and_indices() -> None:
    indices = torch.arange(100)
    keys = torch.stack([sample_keys(seed, step, indices) for seed in range(20) for step in range(20)])
    assert len(keys.unique()) == keys.numel() == 40_000  # seed 1, step 0 is not seed 0, step 1, and so on


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_sample_keys_take_any_integer_dtype(dtype: torch.dtype) -> None:
    assert torch.equal(sample_keys(0, 1, torch.arange(9, dtype=dtype)), sample_keys(0, 1, torch.arange(9)))


def test_numbers_beyond_int64_wrap() -> None:
    indices = torch.tensor([0, 1, 2**63 - 1, -(2**63)])
    edges = [0, -1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 2**64 + 5, 2**100 + 7, -(2**100)]
    for number in edges:
        keys = sample_keys(number, number, indices)
        assert keys.dtype == torch.int64
        assert torch.equal(keys, sample_keys(number % 2**64, number % 2**64, indices))
        assert uniform(keys, (50,)).max() < 1
    seeds = {number % 2**64 for number in edges}
    distinct = torch.stack([sample_keys(seed, 0, indices) for seed in seeds])
    assert len(distinct.unique()) == distinct.numel()


def test_derive_without_numbers_keeps_the_keys() -> None:
    assert torch.equal(derive(keys_of(4)), keys_of(4))


def test_fresh_keys_follow_torchs_seed() -> None:
    torch.manual_seed(3)
    first, second = fresh_keys(100, "cpu"), fresh_keys(100, "cpu")
    assert first.dtype == torch.int64 and len(torch.cat([first, second]).unique()) == 200
    torch.manual_seed(3)
    assert torch.equal(fresh_keys(100, "cpu"), first)
