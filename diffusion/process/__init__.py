"""The mathematics of diffusion: schedules, Gaussians, predictions, objectives, the bound, samplers. Pure functions.

Notation (Ho et al. 2020, arXiv:2006.11239; Kingma et al. 2021, arXiv:2107.00630):

    q(x_t | x_0) = N(alpha_t x_0, v_t I),    alpha_t^2 + v_t = 1,    alpha_t^2 = alpha_bar_t,
    log_snr_t = log(alpha_t^2 / v_t)

Noise levels are carried as `log_snr` in float64: both alpha_t near one and v_t near one keep all their digits there.
"""
