"""Noise schedules against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.process.schedule import Cosine, chain, cosine, linear, noise_variance, signal, zero_terminal_snr


def test_linear_is_the_cumulative_product_of_its_betas() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    table = linear(1000).table
    torch.testing.assert_close(signal(table) ** 2, alpha_bar, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise_variance(table), 1 - alpha_bar, rtol=1e-9, atol=0)
    # The value that a float32 table gets wrong in the fourth digit.
    assert float(noise_variance(table[0])) == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_cosine_follows_its_formula_until_betas_are_clipped(steps: int) -> None:
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    kept = slice(0, int(steps * 0.9))
    torch.testing.assert_close(signal(cosine(steps).table)[kept] ** 2, f[kept], rtol=1e-9, atol=0)


@given(st.floats(-12, 12), st.floats(-12, 12), st.floats(1e-6, 1))
def test_continuous_cosine_reaches_its_ends_and_falls(first: float, second: float, time: float) -> None:
    high, low = max(first, second), min(first, second)
    if high - low < 0.1:
        high = low + 0.1
    schedule = Cosine(high, low)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([high, low], abs=1e-6)
    here, later = schedule.log_snr(torch.tensor([time * 0.99, time], dtype=torch.float64))
    assert low - 1e-6 <= later < here <= high + 1e-6


@given(st.floats(-40, 40))
def test_signal_and_noise_share_the_variance(log_snr: float) -> None:
    value = torch.tensor(log_snr, dtype=torch.float64)
    assert float(signal(value) ** 2 + noise_variance(value)) == pytest.approx(1, abs=1e-15)
    assert float(torch.log(signal(value) ** 2 / noise_variance(value))) == pytest.approx(log_snr, abs=1e-9)


@pytest.mark.parametrize("schedule", [linear(100), cosine(100), Cosine(10, -10)])
def test_a_chain_takes_every_step_once_and_only_gets_noisier(schedule) -> None:  # type: ignore[no-untyped-def]
    levels = chain(schedule, 100)
    assert (levels.diff() < 0).all()
    if hasattr(schedule, "table"):
        assert torch.equal(levels, schedule.table)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start() -> None:
    before, after = linear(1000), zero_terminal_snr(linear(1000))
    assert float(signal(after.table[-1])) == 0
    assert float(signal(after.table[0])) == pytest.approx(float(signal(before.table[0])), rel=1e-12)
    assert (after.table.diff() < 0).all()
