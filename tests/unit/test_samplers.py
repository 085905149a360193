"""Samplers on Gaussian data, where the optimal denoiser is known: they must reach its mean and variance, at their order."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion.process.gaussian import posterior
from diffusion.process.levels import sampling_levels
from diffusion.process.reverse import Estimate
from diffusion.process.samplers import ancestral, ddim, dpmpp
from diffusion.process.schedule import Cosine, Schedule, cosine, noise_variance, signal, zero_terminal_snr

MEAN, STD = 0.7, 0.6
SCHEDULE = Cosine(12.0, -12.0)


def optimal(x: Tensor, log_snr: Tensor) -> Tensor:
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""
    alpha, v = signal(log_snr), noise_variance(log_snr)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + v)
    return MEAN + gain * (x - alpha * MEAN)


def predict(x: Tensor, log_snr: Tensor) -> Estimate:
    return Estimate(optimal(x, log_snr))


def silent(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def exact_flow(x: Tensor, levels: Tensor) -> Tensor:
    """The probability flow of a Gaussian is affine: x_t = alpha m + sqrt(alpha^2 s^2 + v) z with z fixed."""
    first = levels[0]
    z = (x - signal(first) * MEAN) / (signal(first) ** 2 * STD**2 + noise_variance(first)).sqrt()
    last = levels[-1]
    x_last = signal(last) * MEAN + (signal(last) ** 2 * STD**2 + noise_variance(last)).sqrt() * z
    return optimal(x_last, last)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp, 2)])
def test_deterministic_samplers_converge_to_the_flow_at_their_order(sampler: Callable[..., Tensor], order: int) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        levels = sampling_levels(SCHEDULE, steps, "uniform_log_snr")
        errors.append(float((sampler(predict, x, levels, silent) - exact_flow(x, levels)).abs().max()))
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(m - order) < 0.35 for m in measured), (errors, measured)


@pytest.mark.parametrize("spacing", ["karras", "uniform_time", "uniform_log_snr"])
def test_second_order_needs_few_steps(spacing) -> None:  # type: ignore[no-untyped-def]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    levels = sampling_levels(Cosine(10.0, -10.0), 30, spacing)
    assert float((dpmpp(predict, x, levels, silent) - exact_flow(x, levels)).abs().max()) < 0.03


@pytest.mark.parametrize("subset", [1000, 100])
def test_ancestral_sampling_reaches_mean_and_variance(subset: int) -> None:
    rng = torch.Generator().manual_seed(1)
    levels = sampling_levels(SCHEDULE, subset, "uniform_log_snr")
    x = torch.randn(40_000, generator=rng, dtype=torch.float64)
    out = ancestral(predict, x, levels, lambda step: torch.randn(len(x), generator=rng, dtype=torch.float64))
    # Four standard errors of the two estimates, and a first-order term that shrinks with the steps.
    bias = 3.0 / subset
    assert float(out.mean()) == pytest.approx(MEAN, abs=4 * STD / 200 + bias)
    assert float(out.std()) == pytest.approx(STD, abs=4 * STD / 200 / math.sqrt(2) + bias)


def test_ddim_with_eta_one_has_the_ancestral_transitions() -> None:
    levels = torch.tensor([-3.0, 0.5], dtype=torch.float64)
    x = torch.tensor([0.3, -1.2], dtype=torch.float64)
    mean, variance = posterior(optimal(x, levels[0]), x, levels[0], levels[1])
    noise = torch.tensor([0.8, -0.4], dtype=torch.float64)
    seen: list[Tensor] = []

    def watched(x_t: Tensor, log_snr: Tensor) -> Estimate:
        seen.append(x_t)
        return predict(x_t, log_snr)

    ddim(watched, x, levels, lambda step: noise, eta=1.0)
    torch.testing.assert_close(seen[1], mean + variance.sqrt() * noise)


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpmpp])
def test_sampling_starts_at_pure_noise_with_zero_terminal_snr(sampler: Callable[..., Tensor]) -> None:
    levels = sampling_levels(zero_terminal_snr(cosine(100)), 100, "uniform_time")
    assert levels[0] == -math.inf
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=rng, dtype=torch.float64)
    out = sampler(predict, x, levels, lambda step: torch.randn(len(x), generator=rng, dtype=torch.float64))
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(out.std()) == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpmpp])
@pytest.mark.parametrize("schedule", [cosine(20), zero_terminal_snr(cosine(20))])
def test_more_steps_than_a_schedule_has_are_all_that_it_has(sampler: Callable[..., Tensor], schedule: Schedule) -> None:
    levels = sampling_levels(schedule, 50, "uniform_time")
    assert torch.equal(levels, sampling_levels(schedule, 20, "uniform_time"))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    noise = torch.zeros(9, dtype=torch.float64)
    assert torch.isfinite(sampler(predict, x, levels, lambda step: noise)).all()


@pytest.mark.parametrize("spacing", ["karras", "uniform_time", "uniform_log_snr"])
def test_levels_start_at_the_last_time_and_rise(spacing) -> None:  # type: ignore[no-untyped-def]
    levels = sampling_levels(SCHEDULE, 20, spacing)
    assert len(levels) == 20
    assert float(levels[0]) == pytest.approx(-12, abs=1e-6)
    assert (levels.diff() > 0).all()


def test_the_learned_variance_that_is_right_for_the_data_leaves_no_error_of_few_ancestral_steps() -> None:
    """For Gaussian data the true p(x_s | x_t) is a Gaussian whose variance lies between the two bounds: told it, the chain
    has the right variance at any number of steps, where the posterior's loses some."""

    def told(x: Tensor, log_snr: Tensor, after: Tensor) -> Estimate:
        gain = noise_variance(log_snr) / (signal(log_snr) ** 2 * STD**2 + noise_variance(log_snr))
        posterior_of_x0 = STD**2 * gain
        on_x0 = -torch.expm1(log_snr - after) * signal(after)
        low = -torch.expm1(log_snr - after) * noise_variance(after)
        high = -torch.expm1(log_snr - after) * noise_variance(log_snr)
        mix = torch.log((low + on_x0**2 * posterior_of_x0) / low) / torch.log(high / low)
        assert 0 <= float(mix) <= 1 + 1e-9
        return Estimate(optimal(x, log_snr), mix.expand_as(x))

    rng = torch.Generator().manual_seed(2)
    levels = sampling_levels(SCHEDULE, 8, "uniform_log_snr")
    x = torch.randn(100_000, generator=rng, dtype=torch.float64)
    following = dict(zip(levels[:-1].tolist(), levels[1:], strict=True))
    spreads = []
    for learned in (False, True):

        def ask(x_t: Tensor, now: Tensor, learned: bool = learned) -> Estimate:
            after = following.get(float(now))
            return told(x_t, now, after) if learned and after is not None else predict(x_t, now)

        x_last: list[Tensor] = []

        def watched(x_t: Tensor, now: Tensor, ask=ask, x_last=x_last) -> Estimate:  # type: ignore[no-untyped-def]
            x_last.append(x_t)
            return ask(x_t, now)

        ancestral(watched, x, levels, lambda step: torch.randn(len(x), generator=rng, dtype=torch.float64))
        spreads.append(float(x_last[-1].std()))
    right = float((signal(levels[-1]) ** 2 * STD**2 + noise_variance(levels[-1])).sqrt())
    assert spreads[1] == pytest.approx(right, rel=0.01)
    assert spreads[0] < 0.9 * right


def test_a_respaced_chain_has_the_marginals_of_the_full_one() -> None:
    """The posterior composed over two steps is the posterior over both: the subset's chain is the same process."""
    full = cosine(1000).table.flip(0)
    x0, x_t = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.8], dtype=torch.float64)
    for t, s, r in ((100, 400, 700), (0, 10, 990)):
        mean_s, variance_s = posterior(x0, x_t, full[t], full[s])
        mean_r, variance_r = posterior(x0, mean_s, full[s], full[r])
        on_x_s = posterior(torch.zeros_like(x0), torch.ones_like(x0), full[s], full[r])[0]
        direct_mean, direct_variance = posterior(x0, x_t, full[t], full[r])
        torch.testing.assert_close(mean_r, direct_mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            variance_r + on_x_s**2 * variance_s, direct_variance.expand(1), rtol=1e-9, atol=1e-12
        )
    # And a sampler's levels lie on the full chain: 50 of its 1000 steps, the last of all among them.
    subset = sampling_levels(cosine(1000), 50, "uniform_time")
    assert set(subset.tolist()) <= set(full.tolist())
    assert float(subset[0]) == float(full[0])
