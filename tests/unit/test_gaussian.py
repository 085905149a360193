"""Gaussian formulas against torch.distributions, Bayes' rule, and sums that must be one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusion.process.gaussian import discretised_log_likelihood, gaussian_kl, posterior, prior_kl
from diffusion.process.schedule import noise_variance, signal


def transition_variance(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Variance of q(x_t | x_s): v_t - (alpha_t / alpha_s)^2 v_s (Kingma et al. 2021, eq. 20)."""
    return noise_variance(t) - (signal(t) / signal(s)) ** 2 * noise_variance(s)


reals = st.floats(-5, 5)


@given(reals, reals, st.floats(-6, 6), st.floats(-6, 6))
def test_kl_is_that_of_torch_distributions(mean_1: float, mean_2: float, log_var_1: float, log_var_2: float) -> None:
    values = [torch.tensor(v, dtype=torch.float64) for v in (mean_1, log_var_1, mean_2, log_var_2)]
    first = Normal(values[0], (values[1] / 2).exp())
    second = Normal(values[2], (values[3] / 2).exp())
    assert float(gaussian_kl(*values)) == pytest.approx(float(kl_divergence(first, second)), rel=1e-9, abs=1e-12)


def test_kl_keeps_its_digits_where_the_variances_almost_agree() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    # KL = (e^d - 1 - d) / 2 = d^2 / 4 + …; the naive difference loses it all at d = 1e-9.
    assert float(gaussian_kl(zero, zero + 1e-6, zero, zero)) == pytest.approx(2.5e-13, rel=1e-3)


@given(st.floats(-8, 8), st.floats(0.01, 6), reals, reals)
def test_posterior_is_bayes_rule(log_snr_t: float, gap: float, x0: float, x_t: float) -> None:
    t, s = (torch.tensor(v, dtype=torch.float64) for v in (log_snr_t, log_snr_t + gap))
    mean, variance = posterior(torch.tensor(x0, dtype=torch.float64), torch.tensor(x_t, dtype=torch.float64), t, s)
    # q(x_s | x_0) q(x_t | x_s) as a product of two Gaussians in x_s.
    prior_mean, prior_variance = float(signal(s)) * x0, float(noise_variance(s))
    step, step_variance = float(signal(t) / signal(s)), float(transition_variance(t, s))
    precision = 1 / prior_variance + step**2 / step_variance
    expected = (prior_mean / prior_variance + step * x_t / step_variance) / precision
    assert float(variance) == pytest.approx(1 / precision, rel=1e-9)
    assert float(mean) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_prior_kl_against_torch_distributions() -> None:
    x0, log_snr = torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64), torch.tensor([-4.0], dtype=torch.float64)
    last = Normal(signal(log_snr) * 1.5, noise_variance(log_snr).sqrt())
    expected = kl_divergence(last, Normal(torch.zeros(1, dtype=torch.float64), 1.0))
    torch.testing.assert_close(prior_kl(x0, log_snr).flatten(), expected)


@given(st.floats(-1.5, 1.5), st.floats(-5, 2))
def test_the_discretised_decoder_is_a_distribution_over_the_256_values(mean: float, log_std: float) -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_mass = discretised_log_likelihood(
        values,
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(log_std, dtype=torch.float64).exp(),
        torch.tensor(2 / 255, dtype=torch.float64),
        values[0],
        values[-1],
    )
    assert (log_mass <= 1e-12).all()
    assert float(log_mass.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_discretised_decoder_is_finite_and_right_far_out_in_the_tail() -> None:
    one = torch.ones((), dtype=torch.float64)
    far = discretised_log_likelihood(one * 0.5, one * -0.5, one * 0.01, one * 2 / 255, -one, one)
    near_edge = (0.5 - 1 / 255 + 0.5) / 0.01
    assert float(far) == pytest.approx(-(near_edge**2) / 2, rel=0.01)
