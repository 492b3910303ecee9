"""How good generated digits are, judged against the real ones with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from data import Digits
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor

FEATURES = 16  # principal components; they hold 85 % of the variance of the real digits


@dataclass(frozen=True)
class Judge:
    """A classifier and a feature space fitted to real digits: deterministic, and quick enough to fit on each use."""

    classifier: SVC
    features: PCA
    real: NDArray[np.float64]

    @classmethod
    def fit(cls, digits: Digits) -> Judge:
        """Fit a support vector classifier and principal components to real digits."""
        pixels = _pixels(digits.images)
        features = PCA(FEATURES, svd_solver="full").fit(pixels)
        return cls(SVC(gamma="scale").fit(pixels, digits.labels.numpy()), features, features.transform(pixels))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images [N, 1, 8, 8] that the classifier takes for their own class."""
        return float(self.classifier.score(_pixels(images), labels.numpy()))

    def frechet(self, images: Tensor) -> float:
        """Return the Frechet distance between images [N, 1, 8, 8] and the real digits, in principal components.

        It shrinks as N grows, so compare figures of equal N only.
        """
        return frechet_distance(self.features.transform(_pixels(images)), self.real)


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features [N, D] and [M, D].

    `|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`, Dowson & Landau 1982; the trace of the root is the sum of the
    roots of the eigenvalues of A B, which are real and not negative for covariances A and B.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)
    offset = a.mean(axis=0) - b.mean(axis=0)
    return float(offset @ offset + np.trace(cov_a + cov_b) - 2 * np.sqrt(eigenvalues).sum())


def _pixels(images: Tensor) -> NDArray[np.float64]:
    return images.flatten(1).double().numpy()
