import numpy as np
import pytest

from experiments.rank_correlation import spearman


def test_rank_correlation_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over the root of 4.5 and 5.
    found = spearman(np.array([1.0, 2, 2, 9]), np.array([1.0, 2, 3, 4]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))
