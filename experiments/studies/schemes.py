"""Accuracy against measured latency for channels, unstructured zeros and blocks, after the same fine-tuning.

Start it with ``make schemes`` or ``python -m experiments.studies.schemes``; it writes ``docs/benchmarks/schemes.md``.
Each network is a cell in a folder of its own, done once; a sitting may end at any time, and the next one continues
where it stopped, inside a fine-tuning too. ``--images 512 --epochs 1`` with another ``--root`` and ``--page`` tries
all of it in minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from envs.action import project
from envs.plans import uniform
from envs.space import SearchSpace
from graph_encoder.capture import capture
from graph_encoder.network import NetworkGraph
from latency.budget import Budget
from latency.cost import predict_cost
from latency.runtimes import SPARSE, LatencyError, find_runtime
from pruning.batch_norm import reestimate_batch_norm
from pruning.density import Gradual
from pruning.export import load_compressed, save_compressed
from pruning.files import CheckpointError, write_atomic
from pruning.importance import rank_units
from pruning.policy import CompressionPolicy, LayerPolicy
from pruning.sparse_training import prune_along
from pruning.surgery import apply_policy

from ..config import FinetuneConfig
from ..data import (
    DataError,
    DataRecipe,
    ImageData,
    ImageSplit,
    TrainBatches,
    calibration_batches,
    make_judge,
    normalise,
)
from ..image_folder import split_lists
from ..interrupt import Interrupted, StopFlag, stop_on_signals
from ..machine import describe_machine, set_up_device
from ..models import ModelError, build_model, load_weights
from ..progress import RunDisplay, count
from ..training import tune
from .schemes_cells import Cell, matrix
from .schemes_page import write_page
from .schemes_timing import time_networks

EPOCHS = {"resnet20": 3, "resnet56": 2}
"""Of fine-tuning: about half an hour for all networks of a model on two cores."""
PRUNING_SHARE = 0.6
"""Of the fine-tuning in which zeros still grow; the rest trains with the final pattern."""
CUTS = 30
"""Steps of the way to the final density."""


class SchemesError(RuntimeError):
    """Cells that do not belong together."""


@dataclass(frozen=True)
class Sitting:
    """Where the cells are carried out and what with.

    Attributes:
        root: folder of the cells.
        data: archive or folder of CIFAR-10 as images.
        models: folder of the trained networks.
        epochs: of fine-tuning; None for `EPOCHS`.
        images: of each split, drawn at random; 0 for all.
        rounds: timed calls of each network.
    """

    root: Path
    data: Path
    models: Path
    epochs: int | None
    images: int
    rounds: int

    def recipe(self, cell: Cell) -> FinetuneConfig:
        """The same fine-tuning for all networks of a model, by the defaults of a run but for length and precision."""
        return FinetuneConfig(epochs=self.epochs or EPOCHS[cell.model], autocast=True)

    @cached_property
    def image_data(self) -> ImageData:
        """CIFAR-10: the even files of the test folder are validation images, the odd ones the test."""
        paths = split_lists(self.data, "test", self.root / "lists")
        lists = {
            name: {"folder": "test", "list_file": str(path)}
            for name, path in zip(("validation", "test"), paths, strict=True)
        }
        return ImageData(DataRecipe.model_validate({"source": str(self.data), **lists}))

    def split(self, name: str) -> ImageSplit:
        """The images of a split that are used."""
        split: ImageSplit = getattr(self.image_data, name)
        if not self.images:
            return split
        return split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: self.images])

    def example(self, n_images: int) -> Tensor:
        """The first images of the validation split as networks read them."""
        return normalise(self.image_data.validation.images[:n_images], self.image_data.recipe)

    def dense(self, name: str) -> nn.Module:
        """The trained network that everything starts from."""
        model = build_model(name, len(self.image_data.classes)).eval()
        load_weights(model, self.models / f"{name}-cifar10.safetensors")
        return model

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell needs no more work.

        Raises:
            SchemesError: if it was done by another recipe.
        """
        path = self.root / cell.folder / "cell.json"
        if not path.exists():
            return False
        before, asked = json.loads(path.read_text())["recipe"], self._plain_recipe(cell)
        changed = ", ".join(
            f"{key} {before.get(key)}, now {asked.get(key)}"
            for key in {**asked, **before}
            if before.get(key) != asked.get(key)
        )
        if changed:
            msg = f"'{path.parent}' was made by another recipe: {changed}; ask for the same one, or name another --root"
            raise SchemesError(msg)
        return True

    def carry_out(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> None:
        """Make, fine-tune and score one network."""
        folder, recipe, data = self.root / cell.folder, self.recipe(cell), self.image_data.recipe
        dense = self.dense(cell.model)
        graph = capture(dense, self.example(2))
        channels, layers = channel_policy(cell, dense, graph), sparse_layers(cell, graph)
        network = apply_policy(dense, graph, channels)
        train = self.split("train")
        if channels.kept:
            reestimate_batch_norm(network, calibration_batches(train, data, seed=cell.seed))
        batches = TrainBatches(train, data, batch_size=recipe.batch_size, seed=cell.seed)
        with prune_along(network, layers, schedule(recipe.epochs * len(batches))):
            tune(network, batches, recipe, cell.seed, str(cell.folder), display, stop, scratch=folder / "training")
        policy = CompressionPolicy(channels.kept, channels.sizes, layers)
        save_compressed(network, policy, folder / "network", constructor=cell.model, example_inputs=self.example(2))
        shutil.rmtree(folder / "training", ignore_errors=True)
        judged = {name: make_judge(self.split(name), data)(network) for name in ("validation", "test")}
        facts = {
            "recipe": self._plain_recipe(cell),
            "macs": predict_cost(graph, policy) / predict_cost(graph, CompressionPolicy()),
            "params": predict_cost(graph, policy, "params") / predict_cost(graph, CompressionPolicy(), "params"),
            "validation_accuracy": judged["validation"].double().mean().item(),
            "test_accuracy": judged["test"].double().mean().item(),
            "test_judged": "".join("1" if is_right else "0" for is_right in judged["test"].tolist()),
            "machine": describe_machine(torch.device("cpu")).model_dump(),
        }
        write_atomic(folder / "cell.json", json.dumps(facts, indent=1).encode())

    def time(self, model: str, cells: list[Cell], threads: int, display: RunDisplay) -> None:
        """Time the finished networks of a model in turn, unless just these were timed."""
        path = self.root / model / f"latency-{threads}.json"
        names = [cell.folder.name for cell in cells]
        if path.exists():
            before = json.loads(path.read_text())
            if list(before["networks"]) == names and before["rounds"] >= self.rounds:
                return
        display.say(f"timing {len(cells)} networks of {model} with {count(threads, 'thread')}")
        n_classes = len(self.image_data.classes)
        networks = {
            name: load_compressed(self.root / model / name / "network", lambda: build_model(model, n_classes))
            for name in names
        }
        report = time_networks(networks, self.example(1), threads=threads, rounds=self.rounds)
        write_atomic(path, json.dumps(report, indent=1).encode())

    def _plain_recipe(self, cell: Cell) -> dict[str, Any]:
        return {**self.recipe(cell).model_dump(mode="json"), "images": self.images}


def channel_policy(cell: Cell, dense: nn.Module, graph: NetworkGraph) -> CompressionPolicy:
    """The same share of channels out of every group that may lose any, the first layer's among them."""
    if cell.macs == 1:
        return CompressionPolicy()
    space = SearchSpace.build(
        graph,
        {name: scores.numpy() for name, scores in rank_units(dense, graph, "l1").items()},
        Budget(share=cell.macs),
        rounding=cell.rounding,
        protect_first=False,
    )
    return space.policy(project(uniform(space), space))


def sparse_layers(cell: Cell, graph: NetworkGraph) -> dict[str, LayerPolicy]:
    """The same density in all convolutions but the first, and not in the layer of the outputs."""
    if cell.density == 1:
        return {}
    weighted = [operator.layer for operator in graph.operators if operator.weight]
    return {name: LayerPolicy(cell.pattern, cell.density) for name in dict.fromkeys(weighted[1:-1])}


def schedule(steps: int) -> Gradual:
    """From all weights to the final density, so that the last steps train what is left."""
    end = max(1, round(PRUNING_SHARE * steps))
    return Gradual(start=0, end=end, every=max(1, end // CUTS))


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as an image folder or archive.")] = Path(
        "../shared/data/cifar10-jpeg.tar.gz"
    ),
    models: Annotated[Path, typer.Option(help="Folder with resnet20- and resnet56-cifar10.safetensors.")] = Path(
        "../shared/models"
    ),
    root: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("runs/schemes"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/benchmarks/schemes.md"),
    seeds: Annotated[int, typer.Option(help="Seeds of each network, from 0.", min=1)] = 1,
    only: Annotated[str, typer.Option(help="Regular expression: do only the cells whose folder it matches.")] = "",
    minutes: Annotated[float, typer.Option(help="Start no further cell after so many minutes; 0 for no end.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Of fine-tuning, for all networks.", min=1)] = None,
    images: Annotated[int, typer.Option(help="Of each split, to try it out; 0 for all.", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="Timed calls of each network.", min=5)] = 200,
    threads: Annotated[list[int] | None, typer.Option(help="Threads to time with, by default 1 and then 2.")] = None,
    render: Annotated[bool, typer.Option("--render", help="Only write the page from what is there.")] = False,
) -> None:
    """Carry out the cells that are missing, time the finished networks, and write the page."""
    started = time.monotonic()
    sitting, cells = Sitting(root, data, models, epochs, images, rounds), list(matrix(seeds))
    with RunDisplay() as display, stop_on_signals(display.say) as stop:
        try:
            if not render:
                # Hours of training would be for nothing without the kernels to time.
                find_runtime(SPARSE)
                set_up_device("cpu", 0)
            for cell in cells:
                late = minutes and time.monotonic() - started > 60 * minutes
                if render or late or sitting.is_done(cell) or not re.search(only, str(cell.folder)):
                    continue
                display.say(f"cell {cell.folder}")
                sitting.carry_out(cell, display, stop)
            for model, own in _first_seed(sitting, cells).items() if not render else ():
                for n_threads in threads or (1, 2):
                    sitting.time(model, own, n_threads, display)
                    stop.check()
        except Interrupted as stopped:
            display.say(f"{stopped}; run the same command to go on")
        except (SchemesError, LatencyError, CheckpointError, DataError, ModelError) as error:
            display.say(str(error))
            raise typer.Exit(1) from error
        finally:
            done = [cell for cell in cells if (root / cell.folder / "cell.json").exists()]
            write_page(page, root, done, len(cells))
            display.say(f"{len(done)} of {len(cells)} cells are done; wrote {page}")


def _first_seed(sitting: Sitting, cells: list[Cell]) -> Mapping[str, list[Cell]]:
    """Finished cells of the first seed by model, of the models whose dense network is among them."""
    by_model: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.seed == 0 and sitting.is_done(cell):
            by_model.setdefault(cell.model, []).append(cell)
    return {model: own for model, own in by_model.items() if own[0].scheme == "dense"}


if __name__ == "__main__":
    typer.run(main)
