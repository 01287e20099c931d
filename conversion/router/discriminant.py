"""The router's head on trunk features in closed form: linear discriminant analysis.

The features x of each expert's queries are taken for normal, with a mean of their own and one covariance S, so the
logits are linear: m_e S^-1 x - m_e S^-1 m_e / 2. As the counts do, it describes each expert's queries and fits no
border between them. S is shrunk towards a multiple of the identity, as features are many and queries few.

Shapes: B queries, H features, N experts.
"""

import numpy as np

SHRINKAGE = 0.3


def discriminant(
    features: np.ndarray, labels: np.ndarray, influence: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, H) weights and (N,) biases, both float64, of mean 0 over the experts that have queries; 0 for the others.

    Args:
        features: (B, H), standardised.
        influence: (B,) of each query; an expert's queries count as much as another's in all.
    """
    means = np.zeros((num_experts, features.shape[1]))
    covariance = np.zeros((features.shape[1], features.shape[1]))
    present = sorted(set(labels.tolist()))
    for expert in present:
        part, shares = features[labels == expert], influence[labels == expert]
        shares = shares / shares.sum()
        means[expert] = shares @ part
        centred = part - means[expert]
        covariance += (centred * shares[:, None]).T @ centred / len(present)
    size = np.trace(covariance) / len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * max(size, 1e-12) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T).T
    biases = -(weights * means).sum(-1) / 2
    for values in (weights, biases):
        values[present] -= values[present].mean(0)
    return weights, biases
