"""The tables of docs/results.md: a matrix of runs, done in order of worth; what is finished is not done again.

Start it with ``make results`` or ``python -m experiments.studies.results``. A sitting may end at any time; the next one
continues where it stopped, inside a run too. What a finished cell found is kept as a record, under version control, so
that sittings add up when run folders are gone: to have a cell done again, delete its record and its run folder, and
those of the cell that it is timed beside or that is timed beside it.

With ``--time-again`` the latencies of the records are read anew, on another processor or by another release, in
networks that are made from their plans and kept below ``again`` among the run folders; that folder is to be deleted to
read them once more.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from envs.evaluator import CandidateEvaluator
from envs.journal import Journal
from graph_encoder.errors import SecateurError
from latency.budget import Budget
from pruning.files import write_atomic
from pruning.layer_policy import FULL_BITS
from pruning.policy import CompressionPolicy

from ..apply import apply_saved
from ..config import LatencyConfig, Method, RunConfig, load_config
from ..finish import save_product
from ..floor import LatencyFloors, find_floors
from ..image_folder import split_lists
from ..interrupt import Interrupted, StopFlag, stop_on_signals
from ..machine import describe_machine, set_up_device
from ..methods import MethodSearch
from ..outcome import DENSE, Speed
from ..problem import PROBES
from ..progress import RunDisplay
from ..run import RunBusyError, RunFolder, locked
from ..search import create_run, resume_run, space_of_graph
from ..standalone_training import train_named
from ..subject import prepare_subject
from ..table_building import build_named
from .matrix import EVALUATIONS, SHORTCUT_GROUPS, Cell, matrix
from .records import keep
from .results_page import render_page

TRAINING = {"train.epochs": 8, "train.autocast": True}
"""Of a network that has no weights yet: as many epochs as the weights of ResNet-18 were trained for."""
TIMED_ROUNDS = 200
FLOOR_IMAGES = 8
"""That statistics and ranges of the fastest network are read off: only its time is asked."""


@dataclass(frozen=True)
class Sitting:
    """Where the matrix is carried out and what with.

    Attributes:
        root: folder of the cells.
        records: folder of what is kept of those that are finished.
        data: archive or folder of CIFAR-10 as images.
        models: folder of the trained networks.
        agent: the method whose agent is carried to another network.
    """

    root: Path
    records: Path
    data: Path
    models: Path
    agent: Method

    def config(self, cell: Cell) -> RunConfig:
        """The configuration of one cell."""
        return load_config(None, self._options(cell))

    def _options(self, cell: Cell) -> dict[str, Any]:
        even, odd = split_lists(self.data, "test", self.root / "lists")
        common = {
            "model.weights": str(self._weights(cell.options["model.name"])),
            "data.source": str(self.data),
            # What is applied is chosen already: it is scored on the test images, and the others are not looked at.
            "data.validation": {"folder": "test", "list_file": str(odd if cell.plan else even)},
            "data.test": {"folder": "test", "list_file": str(even if cell.plan else odd)},
            "budget": "50%",
            "search.rounding": 1,
            "search.evaluations": EVALUATIONS,
            "search.protected": SHORTCUT_GROUPS,
            "search.autocast": True,
            "search.batch_size": 100,
            "threads": 1,
        }
        if cell.is_timed:
            common["latency.table"] = str(self._table(cell.options["model.name"]))
        return common | cell.options

    def _weights(self, model: str) -> Path:
        """Where the trained weights of a network are, or will be: among those handed in, or with the cells."""
        name = f"{model.removesuffix('_cifar')}-cifar10.safetensors"
        return self.models / name if (self.models / name).exists() else self.root / name

    def _table(self, model: str) -> Path:
        """Where the latencies of a network's layers are, or will be."""
        return self.root / f"{model}-latency.json"

    def prepare(self, cell: Cell, display: RunDisplay, stop: StopFlag, *, with_table: bool) -> None:
        """Train the cell's network, and time its layers if asked to, where that was not done before.

        Raises:
            RunBusyError: if another sitting does so for a cell of the same network.
        """
        model = cell.options["model.name"]
        with locked(self.root / f".{model}.lock", f"on the weights and the table of {model}"):
            weights = self._weights(model)
            if not weights.exists():
                # The recipe alone, on all processors: what is searched is another matter, and there is no table yet.
                kept = {key: value for key, value in self._options(cell).items() if key.startswith("data.")}
                train_named(load_config(None, kept | TRAINING | {"model.name": model}), weights, display, stop)
            if with_table:
                build_named(model, self._table(model), bits=(8, FULL_BITS), say=display.say)

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell needs no more work: its record is there."""
        return (self.records / cell.name).is_dir()

    def missing(self, cell: Cell) -> Path | None:
        """The plan or the agent that it takes, or the run that it is timed beside, where that is not there yet."""
        source = self._applied_in(cell)
        if cell.beside:
            source = RunFolder(self.root / cell.beside).results_file
        elif cell.searched:
            source = RunFolder(self.records / cell.searched).results_file
        return None if source is None or source.exists() else source

    def carry_out(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> None:
        """Start or continue one cell.

        Raises:
            RunBusyError: if another sitting works on it, or on what it needs.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / f".{cell.name}.lock", f"on cell {cell.name}"):
            # Another sitting may have finished it since it was looked at.
            if not self.is_done(cell):
                self._carry_out(cell, display, stop)
                keep(self.root / cell.name, self.records / cell.name)

    def _carry_out(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> None:
        folder = self.root / cell.name
        if not (folder / "config.yaml").exists():
            # What an interrupted sitting left of it would be refused as a folder that exists.
            shutil.rmtree(folder, ignore_errors=True)
        if source := self._applied_in(cell):
            config = self.config(cell)
            facts = apply_saved(source, config, folder / "network", 0, display, stop)
            del facts["network"]  # which folder it lies in says nothing elsewhere
            facts["machine"] = describe_machine(set_up_device(config.device, config.threads)).model_dump()
            write_atomic(folder / "applied.json", json.dumps(facts, indent=2, default=Speed.to_dict).encode())
            return
        if not (folder / "config.yaml").exists():
            command = ["python", "-m", "experiments.studies.results", "--only", cell.name]
            self.prepare(cell, display, stop, with_table=cell.is_timed)
            self._share_probes(create_run(self._above_floor(cell, display, stop), folder, command, display))
        if cell.searched:
            _take_searches(RunFolder(self.records / cell.searched), RunFolder(folder))
        resume_run(folder, display, stop)
        if cell.is_timed:
            self._time(cell, self.root, folder, display, stop)

    def was_timed_again(self, cell: Cell) -> bool:
        """Whether `time_again` has read the latencies in its record, of these plans and of those beside it."""
        again = self.root / "again"
        files = [f"{cell.name}/timed.json", *(f"{name}/results.json" for name in (cell.name, cell.beside) if name)]
        return all(_are_equal(again / file, self.records / file) for file in files)

    def time_again(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> None:
        """Read the latencies of a recorded cell anew.

        The networks are made from its plans and the weights that were there before fine-tuning, which time does not
        depend on; weights that are missing are trained.

        Raises:
            RunBusyError: if another sitting works on it, on the one that it is timed beside, or on the weights.
        """
        again, record = self.root / "again", self.records / cell.name
        with locked(self.root / f".{cell.name}.lock", f"on cell {cell.name}"), ExitStack() as held:
            self.prepare(cell, display, stop, with_table=cell.above_floor > 0)
            for name in filter(None, (cell.name, cell.beside)):
                held.enter_context(locked(again / f".{name}.lock", f"on the networks of cell {name}"))
                self._rebuild(RunFolder(self.records / name), RunFolder(again / name), cell, display, stop)
            self._time(cell, again, record, display, stop)
            write_atomic(again / cell.name / "timed.json", (record / "timed.json").read_bytes())

    def _rebuild(self, record: RunFolder, run: RunFolder, cell: Cell, display: RunDisplay, stop: StopFlag) -> None:
        """The networks of a record's plans, in a run folder, unless they are there."""
        if _are_equal(run.results_file, record.results_file):
            return
        shutil.rmtree(run.root, ignore_errors=True)
        # Without a table: none is asked for.
        config = self.config(cell).model_copy(update={"latency": LatencyConfig()})
        device = set_up_device(config.device, config.threads)
        subject = prepare_subject(config, device, display, stop, check=lambda _: None)
        builder = CandidateEvaluator(
            subject.model, subject.graph, subject.evaluate_on_validation(), (), range_images=subject.range_images()
        )
        for row in record.outcome().rows:
            policy, network = CompressionPolicy({}), subject.model
            if row.method != DENSE:
                policy = CompressionPolicy.load(record.method(row.method).policy_file)
                network = builder.build(policy)
            save_product(run, subject, row.method, network, policy, display)
        write_atomic(run.config_file, config.to_yaml().encode())
        write_atomic(run.results_file, record.results_file.read_bytes())

    def _time(self, cell: Cell, root: Path, out: Path, display: RunDisplay, stop: StopFlag) -> None:
        """Time the networks in the run folder of a cell, and of the one beside it, and the floor where that is asked.

        Args:
            cell: the cell.
            root: folder of the run folders.
            out: folder of what is read.
            display: told what happens.
            stop: looked at while the subject is prepared.
        """
        runs = [str(root / name) for name in (cell.name, cell.beside) if name]
        measure = [sys.executable, "-m", "experiments.cli", "latency", "measure", *runs, "--json"]
        rounds = ["--rounds", str(TIMED_ROUNDS), "--threads", "1", "--threads", "2"]
        done = subprocess.run([*measure, *rounds], check=True, stdout=subprocess.PIPE)
        write_atomic(out / "timed.json", done.stdout)
        if cell.above_floor:
            floors = self._floors(cell, display, stop).to_dict()
            write_atomic(out / "floor.json", json.dumps(floors, indent=2).encode())

    def _above_floor(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> RunConfig:
        """The configuration, with the latency that `Cell.above_floor` asks for."""
        config = self.config(cell)
        if not cell.above_floor:
            return config
        # A share: the clock of a shared machine runs slow and fast, and with it both networks.
        (floor,) = self._floors(cell, display, stop).floors
        share = floor.measured.ratio if floor.measured else floor.predicted_ns / floor.dense_ns
        asked = math.floor(1000 * cell.above_floor * share) / 1000
        return config.model_copy(update={"budget": (Budget(kind="latency", share=asked),)})

    def _floors(self, cell: Cell, display: RunDisplay, stop: StopFlag) -> LatencyFloors:
        """What the fastest network takes that the cell may choose."""
        config = self.config(cell)
        device = set_up_device(config.device, config.threads)
        subject = prepare_subject(
            config, device, display, stop, check=lambda subject: space_of_graph(config, subject.graph)
        )
        return find_floors(subject.model, subject.graph, config, config.budget, subject.example(FLOOR_IMAGES))

    def _applied_in(self, cell: Cell) -> Path | None:
        if cell.plan:
            name, method = cell.plan
            return RunFolder(self.records / name).method(method).policy_file
        # Agents are too large for records.
        return RunFolder(self.root / cell.agent).method(self.agent).agent_file if cell.agent else None

    def _share_probes(self, run: RunFolder) -> None:
        """Copy the sensitivity probes of a run that asks the same question, so that they are made once."""
        journal = Journal(run.journal_file)
        for other in sorted(self.root.glob("*/config.yaml")):
            probes = Journal(other.parent / "journal.jsonl").entries(PROBES) if other != run.config_file else []
            if probes and _probed_alike(RunFolder(other.parent).config, run.config):
                for entry in probes:
                    journal.append(entry)
                return


def _are_equal(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.read_bytes() == other.read_bytes()


def _take_searches(record: RunFolder, run: RunFolder) -> None:
    """Put what the methods of another cell found in place of searching again, where that is not done yet."""
    outcome = record.outcome()
    for method in run.config.search.methods:
        own = run.method(method)
        if own.search_file.exists():
            continue
        policy = CompressionPolicy.load(record.method(method).policy_file)
        found = MethodSearch(
            **outcome.row(method).model_dump(include=set(MethodSearch.model_fields)),
            kept={name: len(kept) for name, kept in policy.kept.items()},
            layers={name: layer.to_plain() for name, layer in policy.layers.items()},
        )
        policy.save(own.policy_file)
        write_atomic(own.search_file, found.model_dump_json(indent=2).encode())


def _probed_alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether the probes of two runs score the same candidates on the same images."""
    unrelated = {"methods", "evaluations", "environment", "finalists", "start", "span"}

    def asked(config: RunConfig) -> tuple[object, ...]:
        # What a candidate costs is in the journal: its kinds count, and how much of them is allowed does not.
        kinds = [budget.kind for budget in config.budget]
        return config.model, config.data, config.device, kinds, config.search.model_dump(exclude=unrelated)

    return asked(one) == asked(other)


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as an image folder or archive.")] = Path(
        "../shared/data/cifar10-jpeg.tar.gz"
    ),
    models: Annotated[Path, typer.Option(help="Folder with resnet20- and resnet56-cifar10.safetensors.")] = Path(
        "../shared/models"
    ),
    root: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("runs/results"),
    records: Annotated[Path, typer.Option(help="Folder of what is kept of finished cells.")] = Path("docs/results"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/results.md"),
    agent: Annotated[str, typer.Option(help="Agent whose plans are fine-tuned: ppo or ddpg.")] = "ppo",
    only: Annotated[str, typer.Option(help="Regular expression: do only the cells whose name it matches.")] = "",
    minutes: Annotated[float, typer.Option(help="Start no further cell after so many minutes; 0 for no end.")] = 0,
    render: Annotated[bool, typer.Option("--render", help="Only write the page from what is there.")] = False,
    time_again: Annotated[
        bool,
        typer.Option("--time-again", help="Read the latencies of recorded cells again, unless ROOT/again holds them."),
    ] = False,
) -> None:
    """Carry out the cells that are missing and write the page of results; the exit code is 1 if one of them failed."""
    started = time.monotonic()
    chosen: Method = "ddpg" if agent == "ddpg" else "ppo"
    sitting, cells = Sitting(root, records, data, models, chosen), list(matrix(chosen))
    failed: list[str] = []
    with RunDisplay() as display, stop_on_signals(display.say) as stop:
        try:
            for cell in cells:
                late = minutes and time.monotonic() - started > 60 * minutes
                if time_again:
                    has_work = cell.is_timed and sitting.is_done(cell) and not sitting.was_timed_again(cell)
                else:
                    has_work = not sitting.is_done(cell)
                if render or late or not has_work or not re.search(only, cell.name):
                    continue
                if not time_again and (missing := sitting.missing(cell)):
                    display.say(
                        f"cell {cell.name} is left out: it needs {missing}, which is not there; have that cell done "
                        "again"
                    )
                    continue
                display.say(f"cell {cell.name}")
                # Several sittings may share the cells: each takes the next one that is free.
                try:
                    (sitting.time_again if time_again else sitting.carry_out)(cell, display, stop)
                except RunBusyError as busy:
                    display.say(f"cell {cell.name} is left out: {busy}")
                except SecateurError as error:
                    failed.append(cell.name)
                    display.say(f"cell {cell.name} failed: {error}")
        except Interrupted as stopped:
            display.say(f"{stopped}; run the same command to go on")
        finally:
            write_atomic(page, render_page(records, [cell.name for cell in cells], chosen).encode())
            display.say(f"{sum(map(sitting.is_done, cells))} of {len(cells)} cells are done; wrote {page}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
