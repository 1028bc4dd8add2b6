"""The configuration of `experiments.studies.han`: where keys mean what they mean for a run, they are those of a run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..config import ModelConfig, TrainConfig
from ..data import DataRecipe


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PruneConfig(_Section):
    """Rounds of pruning by threshold and retraining."""

    density: float = Field(default=1 / 12, gt=0, lt=1)
    """Share of the weights that is left after the last round."""
    rounds: int = Field(default=5, ge=1)
    """Cuts, each followed by a retraining; each keeps the same share of what is left."""
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    """Validation accuracy that one layer's pruning alone may cost; its quality parameter follows."""
    layers: tuple[str, ...] = ()
    """Layers to prune; all convolutions and linear layers if none is named."""
    curves: bool = False
    """Compare L1 and L2, with and without retraining (the paper's figure 5), with the first seed."""
    l1: float = Field(default=2e-5, ge=0)
    """Strength of the L1 penalty in that comparison."""


class PaperConfig(_Section):
    """What the paper found, to stand beside."""

    kept: dict[str, float] = {}
    """Share of the weights left, by layer."""
    errors: tuple[float, float] | None = None
    """Test error before and after, in [0, 1]."""


class HanConfig(_Section):
    """One network, pruned by Han's rule."""

    name: str
    """What tables and figures call it."""
    model: ModelConfig
    """The network; with weights, it is not trained first."""
    data: DataRecipe = DataRecipe(source="bundled", crop_padding=0)
    """Images, their splits and their preparation."""
    seeds: int = Field(default=3, ge=1)
    """Seeds of weights, batches and training, from 0."""
    folds: int | None = Field(default=None, ge=3)
    """Cross-validation in place of seeds: training and validation images in so many parts, each of which stands once
    for validation and test images; those of the test are not read."""
    train: TrainConfig = TrainConfig()
    """Training from scratch."""
    finetune: TrainConfig = TrainConfig()
    """Retraining after each cut."""
    prune: PruneConfig = PruneConfig()
    """Rounds and thresholds."""
    paper: PaperConfig = PaperConfig()
    """The paper's figures."""
    notes: tuple[str, ...] = ()
    """Items for the page: what was tried and how it was chosen. **Bold** and `code` are understood."""
    threads: int = Field(default=1, ge=0)
    """CPU threads; 0 takes OMP_NUM_THREADS where it is set, else as many as there are cores."""

    @property
    def trials(self) -> range:
        """Seeds, or with cross-validation the folds, each a seed too."""
        return range(self.folds or self.seeds)
