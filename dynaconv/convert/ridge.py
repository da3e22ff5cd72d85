"""Routers without training: ridge regression in closed form, from sums that one pass over the text gathers.

Minimises sum_i |W x_i + b - t_i|^2 + lambda |W|^2, the bias free. With means m_x, m_t and covariances C_xx, C_xt over
the n tokens the solution is W = (C_xx + (lambda / n) I)^-1 C_xt, transposed, and b = m_t - W m_x. Hoerl and Kennard,
Technometrics 12 (1970).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaconv.errors import ArtifactError


def solve_ridge(feature_gram: Tensor, feature_target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (N, D) and bias (N,), float64, of the ridge regression of targets on features.

    Args:
        feature_gram: (D + 1, D + 1), sum over tokens of [x; 1][x; 1]^T; its last entry is the number of tokens.
        feature_target: (D + 1, N), sum over tokens of [x; 1] t^T.
        ridge: lambda / n as a multiple of the mean variance of the features, above 0.

    Raises:
        ArtifactError: The sums are not finite, or are not those of any text.
    """
    extremes = torch.cat([torch.stack(torch.aminmax(sums)) for sums in (feature_gram, feature_target)])
    if not torch.isfinite(extremes).all():  # asked of the sums themselves it would take several copies of them
        raise ArtifactError("the sums of features are not finite", hint="profile again; activations overflowed")
    count = float(feature_gram[-1, -1])
    if count < 1:
        raise ArtifactError("the sums of features are empty", found=f"{count:g} tokens")
    mean, target_mean = feature_gram[:-1, -1].double() / count, feature_target[-1].double() / count
    covariance = feature_gram[:-1, :-1].to(torch.float64, copy=True).div_(count).addr_(mean, mean, alpha=-1)
    shared = (feature_target[:-1].double() / count).addr_(mean, target_mean, alpha=-1)
    variance = float(covariance.diagonal().mean())
    rounding = torch.finfo(feature_gram.dtype).eps * float(feature_gram.diagonal()[:-1].double().mean()) / count
    if abs(variance) <= rounding:  # the features never change, so nothing but the targets' mean can be known
        return torch.zeros_like(shared.T).contiguous(), target_mean
    covariance.diagonal().add_(ridge * variance)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ArtifactError(
            "the sums of features are not positive definite",
            found=f"{count:g} tokens for {len(mean)} features, ridge {ridge:g}",
            hint="raise carve.ridge, or profile more tokens",
        )
    half = torch.linalg.solve_triangular(factor, shared, upper=False)  # cholesky_solve would copy the factor
    weight = torch.linalg.solve_triangular(factor.mT, half, upper=True).T.contiguous()
    return weight, target_mean - weight @ mean


def ridge_peak_bytes(features: int, targets: int) -> int:
    """Largest memory that :func:`solve_ridge` holds at once, its arguments (fp32) included."""
    arguments = 4 * (features + 1) * (features + 1 + targets)
    return arguments + 8 * features * (2 * features + 3 * targets)
