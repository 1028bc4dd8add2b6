"""A run from its first step to its report: every step is saved, and one that is saved is not done again."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from envs.evaluator import Evaluation
from envs.journal import Journal, JournalEntry, JournalError
from envs.reward import RewardError, RewardFunction, resolve_reward
from envs.space import SearchSpace
from graph_encoder.modes import has_bfloat16
from graph_encoder.network import NetworkGraph
from latency.table import LatencyTable
from pruning.export import unique_tensors
from pruning.files import FileWriteError, is_disk_full, write_atomic
from pruning.importance import rank_units

from .clock import TableDevice
from .config import ONE_SHOT, ConfigError, Method, RunConfig, SearchSettings, load_config
from .finish import finish_run, rebuild_report
from .identity import tensors_digest
from .interrupt import Interrupted, StopFlag
from .machine import describe_machine, set_up_device
from .measured_budget import PlanClock, spent_by_the_clock
from .methods import MethodSearch, check_enough, check_has_channels, search_with
from .models import check_trains
from .outcome import RunOutcome, percent
from .precision import NO_KERNELS, settle_precision
from .problem import Scoring, SearchProblem, evaluations_to_probe, least_squares, probe, settle_range, space_by
from .progress import RunDisplay, Stage, count
from .run import MethodFolder, RunBusyError, RunError, RunFolder, reading
from .scalars import EvaluationScalars
from .subject import Subject, prepare_subject, report_dense
from .user_function import UserFunctionError, call, is_reference, load_function

_IMAGES = "images"
"""Key under which the file of the dense weights holds a digest of the images."""
CHANGEABLE = ("finetune", "measure", "device", "threads", "data.download")
"""Keys and sections that a run can be continued with other values of: none says which plan is scored, or on what."""
LITTLE_LEFT = 0.5
"""Share of the dense network's accuracy above chance. Near its fastest, ResNet-56 was left with 0.42 of it by uniform
pruning and bits and with 0.86 where layers were fitted."""


def start_run(config: RunConfig, root: Path, command: Sequence[str], display: RunDisplay, stop: StopFlag) -> RunOutcome:
    """Start a run in a new folder and carry it to its report.

    Args:
        config: what to do.
        root: the run's folder.
        command: what was typed, for the record.
        display: told what happens.
        stop: looked at after every evaluation and epoch.

    Raises:
        RunExistsError: if the folder exists.
        Interrupted: if a signal came in; `resume_run` continues.
    """
    is_own = not root.exists()
    folder = create_run(config, root, command, display)
    try:
        with display.kept_in(folder.log):
            display.say(f"run folder: {root} ({config.device}, {count(folder.machine.threads, 'thread')})")
            return resume_run(root, display, stop)
    except (Interrupted, FileWriteError, RunBusyError):
        raise
    except Exception:
        # Refused input: a folder without any evaluation would only be in the way of the next try.
        if not folder.journal_file.exists():
            for path in root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            # An empty folder that was there before stays.
            if is_own:
                root.rmdir()
        raise


def create_run(config: RunConfig, root: Path, command: Sequence[str], display: RunDisplay) -> RunFolder:
    """Make the folder of a run, with its configuration as `settled_here`; `resume_run` carries it out.

    Raises:
        RunExistsError: if the folder exists.
    """
    device = set_up_device(config.device, config.threads)
    settled = settled_here(_without_idle_methods(config, display), device, display)
    return RunFolder.create(root, settled, describe_machine(device), command)


def _without_idle_methods(config: RunConfig, display: RunDisplay) -> RunConfig:
    """The configuration without the method that has no channels to rank, where nobody chose the methods."""
    search = config.search
    if "channels" in search.decide or "methods" in search.model_fields_set:
        return config
    display.say("search.methods: magnitude is left out, as it ranks channels, and search.decide names none")
    methods = tuple(method for method in search.methods if method != "magnitude")
    return config.model_copy(update={"search": search.model_copy(update={"methods": methods})})


def resume_run(root: Path, display: RunDisplay, stop: StopFlag, changes: Mapping[str, Any] | None = None) -> RunOutcome:
    """Continue the run in ``root`` where it was left, or only rebuild its report if it is finished.

    Args:
        root: the run's folder.
        display: told what happens.
        stop: looked at after every evaluation and epoch.
        changes: keys of the configuration, dotted, and the values that the run goes on with.

    Raises:
        RunError: if there is no run.
        ConfigError: if evaluations depend on a key that is changed, or the run is finished.
        Interrupted: if a signal came in again.
    """
    folder = RunFolder.open(root)
    with display.kept_in(folder.log):
        if changes:
            with folder.locked():
                _change(folder, changes, display)
        if folder.results_file.exists():
            return rebuild_report(folder, display)
        config = folder.config
        device = set_up_device(config.device, config.threads or folder.machine.threads)
        for difference in folder.machine.differences(describe_machine(device)):
            display.say(f"warning: {difference}; the continued run may differ from an uninterrupted one")
        return _execute(folder, config, device, display, stop)


def _change(folder: RunFolder, changes: Mapping[str, Any], display: RunDisplay) -> None:
    """Let a run go on with other values of keys that no evaluation was made by."""
    if refused := [key for key in changes if not {key, key.partition(".")[0]} & set(CHANGEABLE)]:
        msg = (
            f"{', '.join(refused)}: what was evaluated before would not compare with what follows. A run that is "
            f"continued takes other values of {', '.join(CHANGEABLE)}; for those of others start a new one"
        )
        raise ConfigError(msg)
    if folder.results_file.exists():
        msg = (
            f"run {folder.root} is finished, and nothing of it is made again; 'secateur finetune' trains a network of "
            "it otherwise, from RUN/methods/NAME"
        )
        raise ConfigError(msg)
    before, config = load_config(folder.config_file), load_config(folder.config_file, changes)
    # Whatever cannot be used is refused before anything is deleted.
    device = set_up_device(config.device, config.threads or folder.machine.threads)
    if "finetune.autocast" in changes:
        config = settle_precision(config, device, display)
    methods = [MethodFolder(path) for path in sorted(folder.root.glob("methods/*"))]
    # Whether there is a dense control changes none of the others.
    recipe = before.finetune.model_copy(update={"dense_control": config.finetune.dense_control})
    if config.finetune != recipe:
        # A comparison of networks that were not trained alike would say nothing.
        trained = [own for own in methods if own.forget(own.finetuning, own.tuned_file)]
        if trained:
            display.say(f"finetune: {count(len(trained), 'network')} trained otherwise before will be trained anew")
    if (config.finetune, config.measure) != (before.finetune, before.measure):
        for own in methods:
            own.forget(own.model)
    write_atomic(folder.config_file, config.to_yaml().encode())
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    folder.note_command(
        ["secateur", "resume", str(folder.root), *(part for text in settings for part in ("--set", text))]
    )
    display.say(f"goes on with {', '.join(settings)}")


def _execute(
    folder: RunFolder, config: RunConfig, device: torch.device, display: RunDisplay, stop: StopFlag
) -> RunOutcome:
    todo = f"continue with '{folder.resume_command}'"
    try:
        with _full_disk_named(folder.root), folder.locked():
            return _carry_out(folder, config, device, display, stop)
    except Interrupted as stopped:
        msg = f"stopped by {stopped}; everything so far is saved: {todo}"
        raise Interrupted(msg) from None
    except KeyboardInterrupt:
        msg = f"stopped at once; everything before the step that ran is saved: {todo}"
        raise Interrupted(msg) from None
    except RunBusyError:
        raise
    except Exception as error:
        # What is refused before the first evaluation leaves nothing to continue.
        if folder.journal_file.exists() or isinstance(error, FileWriteError | JournalError):
            error.add_note(f"everything before is saved: {todo}")
        raise


@contextmanager
def _full_disk_named(root: Path) -> Iterator[None]:
    """Say where the disk is full: TensorBoard's writers, which are not ours, pass on the system's bare error."""
    tell = threading.excepthook

    def tell_others(failed: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread, and raises what ended it in the thread that works for us too.
        if failed.exc_value is None or not is_disk_full(failed.exc_value):
            tell(failed)

    threading.excepthook = tell_others
    try:
        yield
    except OSError as error:
        if isinstance(error, FileWriteError) or not is_disk_full(error):
            raise
        msg = f"cannot write '{error.filename or root}': no space left on the disk; free some"
        raise FileWriteError(error.errno, msg) from error
    finally:
        threading.excepthook = tell


def _carry_out(
    folder: RunFolder, config: RunConfig, device: torch.device, display: RunDisplay, stop: StopFlag
) -> RunOutcome:
    subject = _subject(folder, config, device, display, stop)
    journal = Journal(folder.journal_file)
    if journal.recovered:
        display.say(f"warning: {journal.recovered}")
    problem = build_problem(subject, _saved_importance(folder, subject), journal)
    tell_precision(config.search, device, display)
    display.plan(_planned_work(config, problem))
    problem = _probed(problem, subject, display, stop)
    target = TableDevice.of(config.latency.table)
    clock = PlanClock.of(subject, problem, target, stop)
    searched = problem if clock is None else spent_by_the_clock(problem, clock, display)
    searches: list[MethodSearch] = []
    for method in config.search.methods:
        searches.append(_search(folder, subject, searched, method, display, stop))
        if len(searches) == 1 and not config.search.reconstruct and "channels" in config.search.decide:
            _tell_of_little_left(searches[0], searched, subject.chance, display)
    return finish_run(folder, subject, problem, searched, searches, target, clock, display, stop)


def _tell_of_little_left(found: MethodSearch, problem: SearchProblem, chance: float, display: RunDisplay) -> None:
    """Say where a plan leaves so little accuracy that plans repaired before they are scored are told apart better."""
    left = found.search_accuracy
    if problem.sensitivity is not None:
        dense = problem.sensitivity.dense_accuracy
    else:
        dense = problem.evaluator("", lambda _: None).dense_accuracy()
    if left - chance >= LITTLE_LEFT * (dense - chance):
        return
    display.say(
        f"warning: {found.method}'s plan is right on {left:.1%} of the search images, the dense network on "
        f"{dense:.1%}: where so much is lost, accuracies tell little of what plans are worth once they are repaired or "
        "fine-tuned. With search.reconstruct=true, pruned layers are fitted to the dense network's by least squares "
        "before a plan is scored"
    )


def _planned_work(config: RunConfig, problem: SearchProblem) -> dict[str, float]:
    """Units of each kind of work in a whole run; repeated plans and shared probes make it an upper bound."""
    searching = [method for method in config.search.methods if method not in ONE_SHOT]
    n_tuned = len(config.search.methods) + config.finetune.dense_control
    evaluations: float = len(searching) * config.search.evaluations + len(config.search.methods)
    if any(map(config.search.uses_probes, config.search.methods)):
        evaluations += _evaluations_to_probe(problem, config.search)
    networks = len(config.search.methods) + 1
    return {"evaluation": evaluations, "epoch": n_tuned * config.finetune.epochs, "network": networks}


def _evaluations_to_probe(problem: SearchProblem, settings: SearchSettings) -> float:
    scoring = problem.scoring
    n_calibration = sum(map(len, scoring.calibration))
    return _probes_of(settings, problem.space, scoring.n_images, n_calibration)


def _probes_of(settings: SearchSettings, space: SearchSpace, n_images: int, n_calibration: int) -> float:
    as_start = settings.starts_from_probes
    return evaluations_to_probe(space, settings.probe_share, n_images, n_calibration, as_start=as_start)


def build_problem(subject: Subject, importance: dict[str, torch.Tensor], journal: Journal) -> SearchProblem:
    """What all methods of a run share, with a uniform start.

    Raises:
        BudgetError: if the budget cannot be met.
        ConfigError: if there is nothing to decide.
    """
    settings = subject.config.search
    space = search_space(subject.config, subject.graph, importance)
    share = settings.probe_share
    scoring = Scoring(
        evaluate=subject.evaluate_on_search_images(),
        calibration=subject.calibration(),
        n_images=subject.n_search,
        reward=_reward(settings, space),
        few_images={share: subject.evaluate_on_search_images(share)} if share < 1 else None,
        reconstruct=least_squares(settings.seed) if settings.reconstruct else None,
        range_images=subject.range_images(),
        calibration_method=settings.calibration_method,
        channels_last=True,
        autocast=settings.autocast,
    )
    return SearchProblem(subject.model, subject.graph, space, scoring, journal, settings.seed)


def tell_precision(settings: SearchSettings, device: torch.device, display: RunDisplay) -> None:
    """Say so where scores are in another precision than was asked for, or 8-bit weights have fewer levels."""
    if settings.reduce_range and settings.decides_bits:
        display.say(
            "search.reduce_range: weights of 8 bits take half of their levels, as x86 processors without VNNI add "
            "pairs of products in 16 bits"
        )
    if settings.autocast and not has_bfloat16(device.type):
        display.say(f"search.autocast: candidates are scored in single precision, as {NO_KERNELS}")
    elif settings.autocast and not settings.scores_in_bfloat16:
        display.say(
            "search.autocast: statistics are re-estimated in bfloat16, and candidates are not scored in it, as bits "
            "are decided, and bfloat16 rounds about as much as 8 bits do"
        )


def search_space(config: RunConfig, graph: NetworkGraph, importance: Mapping[str, torch.Tensor]) -> SearchSpace:
    """What a run may decide, see `space_by`."""
    return space_by(config.search, graph, importance, config.budget, _table(config))


def settled_here(config: RunConfig, device: torch.device, display: RunDisplay) -> RunConfig:
    """The configuration with what was left to this processor settled, so that it stays what it is on any machine.

    That is the range of 8 bits (`with_range`) and the precision (`settle_precision`).
    """
    return settle_precision(with_range(config), device, display)


def with_range(config: RunConfig) -> RunConfig:
    """The configuration with `SearchSettings.reduce_range` settled, so that it stays what it is on any machine."""
    return config.model_copy(update={"search": settle_range(config.search, _table(config))})


def _table(config: RunConfig) -> LatencyTable | None:
    return LatencyTable.load(config.latency.table) if config.latency.table else None


def space_of_graph(config: RunConfig, graph: NetworkGraph) -> SearchSpace:
    """What a run may decide, before anything is known of the weights: `search_space` with all units alike."""
    return search_space(config, graph, {group.name: torch.zeros(group.size) for group in graph.prunable})


def check_search(subject: Subject) -> None:
    """Refuse what cannot be searched, before the network is trained and before anything is scored.

    Raises:
        BudgetError: if the budget cannot be met.
        ConfigError: if there is nothing to decide, or a method of the run is granted too few evaluations or ranks
            channels, and none are decided.
        ModelError: if what is to be fine-tuned returns more than scores in training mode.
        UserFunctionError: if there is no such function as the reward names.
    """
    if subject.config.finetune.epochs:
        check_trains(subject.model, subject.example(2))
    if (reward := subject.config.search.reward) is not None and is_reference(reward):
        load_function(reward)
    settings, space = subject.config.search, space_of_graph(subject.config, subject.graph)
    n_calibration = sum(map(len, subject.calibration()))
    probes = _probes_of(settings, space, subject.n_search, n_calibration)
    for method in settings.methods:
        check_has_channels(method, space)
        check_enough(method, settings, probes, len(subject.data.validation) / subject.n_search)


def _subject(
    folder: RunFolder, config: RunConfig, device: torch.device, display: RunDisplay, stop: StopFlag
) -> Subject:
    """Network and images; the dense weights are kept in the run, so that it needs no other file to continue."""
    saved = folder.dense_file if folder.dense_file.exists() else None

    def check(subject: Subject) -> None:
        if saved is None:
            subject.data.check_test()
        check_search(subject)

    subject = prepare_subject(config, device, display, stop, weights=saved, check=check)
    images = tensors_digest(
        (name, tensor)
        for name, split in (("train", subject.data.train), ("validation", subject.data.validation))
        # A thousand of them tell two sets apart.
        for tensor in (split.labels, split.images[:: len(split) // 1000 + 1])
    )
    if saved is None:
        report_dense(subject, display)
        write_atomic(folder.dense_file, save(unique_tensors(subject.model), metadata={_IMAGES: images}))
    elif _images_of(saved) != images:
        msg = (
            f"the training or validation images of {folder.root} are others than when it was begun, and its "
            "evaluations would not compare with new ones; put those images back, or start a new run"
        )
        raise RunError(msg)
    return subject


def _images_of(dense_file: Path) -> str:
    """Digest of the images that a run was begun with.

    Raises:
        RunError: if the file does not say.
    """
    with safe_open(dense_file, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if _IMAGES not in metadata:
        msg = (
            f"'{dense_file}' does not say on which images the run was begun: it was changed, or written by another "
            "version of secateur; put it back, or start a new run"
        )
        raise RunError(msg)
    return metadata[_IMAGES]


def importance_of(subject: Subject) -> dict[str, torch.Tensor]:
    """Importance of every unit, by group name, on the CPU."""
    criterion = subject.config.search.criterion
    batches = subject.labelled_batches(subject.config.search.calibration_images) if criterion == "taylor" else None
    importance = rank_units(subject.model, subject.graph, criterion, batches=batches)
    return {name: scores.detach().cpu().contiguous() for name, scores in importance.items()}


def _saved_importance(folder: RunFolder, subject: Subject) -> dict[str, torch.Tensor]:
    if not folder.importance_file.exists():
        write_atomic(folder.importance_file, save(importance_of(subject)))
    todo = f"delete it, and '{folder.resume_command}' makes it again"
    with reading(folder.importance_file, todo):
        return load_file(folder.importance_file)


def _probed(problem: SearchProblem, subject: Subject, display: RunDisplay, stop: StopFlag) -> SearchProblem:
    settings = subject.config.search
    if not any(map(settings.uses_probes, settings.methods)):
        return problem
    with display.stage("sensitivity of each decision", _evaluations_to_probe(problem, settings), "evaluation") as stage:
        watch = Watch(stage, problem, stop)
        probed = probe(
            problem,
            settings.probe_share,
            watch,
            as_start=settings.starts_from_probes,
            shown=settings.agents_see_probes,
            notify=lambda message: display.say(f"warning: {message}"),
        )
    if probed.bits_note:
        display.say(probed.bits_note)
    return probed


def _search(
    folder: RunFolder, subject: Subject, problem: SearchProblem, method: Method, display: RunDisplay, stop: StopFlag
) -> MethodSearch:
    own = folder.method(method)
    if own.search_file.exists():
        display.say(f"{method}: searched before")
        todo = f"delete it, and '{folder.resume_command}' makes it again from the evaluations in the journal"
        with reading(own.search_file, todo):
            found = MethodSearch.model_validate_json(own.search_file.read_text())
    else:
        found = _search_anew(folder, subject, problem, method, display, stop)
        problem.policy(found).save(own.policy_file)
        write_atomic(own.search_file, found.model_dump_json(indent=2).encode())
    # Also those that a run left which ended right after it wrote the file: nothing reads them any more.
    shutil.rmtree(own.checkpoints, ignore_errors=True)
    return found


def _search_anew(
    folder: RunFolder, subject: Subject, problem: SearchProblem, method: Method, display: RunDisplay, stop: StopFlag
) -> MethodSearch:
    """Search with one method, from its newest checkpoint and what the journal holds, if there is any."""
    own = folder.method(method)
    entries = [e for e in problem.journal.entries(method, problem.seed) if e.purpose == "candidate"]
    recorded = {math.ceil(e.evaluations_used): problem.reward(e.accuracy, e.cost) for e in entries}
    scalars = EvaluationScalars(folder.tensorboard / method, recorded)
    settings = subject.config.search
    try:
        with display.stage(method, settings.evaluations, "evaluation") as stage:
            found = search_with(
                method,
                problem,
                settings,
                on_evaluation=Watch(stage, problem, stop, scalars, entries),
                on_finalist=Watch(stage, problem, stop),
                evaluate_all=subject.evaluate_on_validation(),
                n_validation=len(subject.data.validation),
                agent=subject.config.agent(method),
                files=own,
                tensorboard=folder.tensorboard / method / "agent",
                notify=lambda message: display.say(f"warning: {message}"),
            )
    finally:
        scalars.close()
    if problem.space.has_one_plan:
        display.say(f"{method}: everything on offer keeps the budget: there is one plan, and nothing to search for")
    elif method not in ONE_SHOT and found.evaluations <= settings.evaluations - 1:
        display.say(
            f"{method}: ended with {found.evaluations:g} of {settings.evaluations} evaluations, as it proposed little "
            f"but plans that it knew: {count(found.plans, 'different plan')}, {found.cache_hits} proposed again"
        )
    return found


class Watch:
    """Shows and logs each evaluation, and stops if asked to: it is safe in the journal by then."""

    def __init__(
        self,
        stage: Stage,
        problem: SearchProblem,
        stop: StopFlag,
        scalars: EvaluationScalars | None = None,
        recorded: Sequence[JournalEntry] = (),
    ) -> None:
        """Watch a search; of ``recorded`` what came before its first evaluation here, a checkpoint holds."""
        self._stage, self._problem, self._stop, self._scalars = stage, problem, stop, scalars
        self._recorded = recorded
        self._best = 0.0
        self._repeats = 0

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation in."""
        if evaluation.cached:
            self._repeats += 1
            self._stage.advance(0, 0.0, self._note)
        else:
            before = [each for each in self._recorded if each.evaluations_used < evaluation.evaluations_used]
            self._recorded = ()
            self._best = max([self._best, evaluation.accuracy, *(each.accuracy for each in before)])
            self._stage.advance(sum(each.fidelity for each in before), 0.0)
            self._stage.advance(evaluation.fidelity, evaluation.seconds, self._note)
            if self._scalars:
                self._scalars.add(evaluation, self._problem.reward(evaluation.accuracy, evaluation.cost))
        self._stop.check()

    @property
    def _note(self) -> str:
        repeats = f", {count(self._repeats, 'known plan')} proposed again" if self._repeats else ""
        return f"best {percent(self._best)}{repeats}"


def _reward(settings: SearchSettings, space: SearchSpace) -> RewardFunction:
    """What the configuration calls a reward; of a user's own function failures are told with its name and place."""
    name = settings.reward
    if name is None or not is_reference(name):
        target = settings.target.limit(space.cost.dense) if settings.target else None
        return resolve_reward(name, space.limit, target=target, beta=settings.beta)
    function = load_function(name)

    def reward(accuracy: float, cost: int, limit: int | None) -> float:
        what = f"the reward function '{name}', called with ({accuracy}, {cost}, {limit}),"
        try:
            return call(what, partial(function, accuracy, cost, limit), {})  # type: ignore[no-any-return]
        except UserFunctionError as error:
            raise RewardError(str(error)) from error

    # Named where its value is refused.
    reward.__name__ = name
    return reward
