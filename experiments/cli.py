"""The `secateur` command: options in, a configuration or a call out; everything else lies in the other modules."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# What loads PyTorch is imported by the command that needs it: `secateur --help` should not take seconds.
if TYPE_CHECKING:
    from .config import RunConfig
    from .interrupt import StopFlag
    from .outcome import RunOutcome
    from .progress import RunDisplay

NO_SPEEDUP = 3
"""Exit code of a command whose networks are not faster than the dense one, where that is asked for."""

app = typer.Typer(
    help="Compress PyTorch networks under a budget, by an agent that reads them as graphs.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

Config = Annotated[
    str | None,
    typer.Argument(
        help="YAML file, or the name of a bundled configuration: digits, galen_pruning, galen_bits, galen_joint, "
        "haq_latency or haq_size."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="torchvision name, small_resnet (default), resnet20, resnet56, ... or package.module:function."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Trained weights: safetensors, or .pt/.pth read weights-only; trained first if not given."),
]
Data = Annotated[
    str | None,
    typer.Option(help="bundled (default), cifar10, cifar100, an image folder or archive, or package.module:function."),
]
Download = Annotated[bool | None, typer.Option("--download", help="Let torchvision fetch CIFAR if it is not there.")]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="50% (default), 30% params, 62.7M macs, 40% latency, several by commas (50%, 20% bytes), or none.",
    ),
]
Table = Annotated[
    Path | None, typer.Option("--latency-table", help="Times of the layers on the device, from 'latency build'.")
]
Evaluations = Annotated[int | None, typer.Option(help="Evaluations of each method; 300 by default.")]
Criterion = Annotated[str | None, typer.Option(help="Importance: l1 (default), l2, fpgm, taylor or bn_scale.")]
Rounding = Annotated[
    int | None, typer.Option(min=1, help="Keep multiples of so many channels; by default 8 from 128 on, else 1.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of search, data order and training; 0 by default.")]
Device = Annotated[str | None, typer.Option(help="cpu (default), cuda, cuda:1 or mps.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; 0 (default) for OMP_NUM_THREADS if it is set, else one a core.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any other key of the configuration: --set search.finalists=5.")
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Channels, height and width of an image; by default 3,32,32 for bundled networks, else 3,224,224. Of a "
        "signal channels and length."
    ),
]
RequireSpeedup = Annotated[
    bool, typer.Option("--require-speedup", help="End with code 3 unless all networks are faster than the dense one.")
]
RunPath = Annotated[Path, typer.Argument(help="Folder of the run.")]


@app.command()
def search(
    config: Config = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    download: Download = None,
    budget: BudgetText = None,
    latency_table: Table = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of uniform,magnitude,sensitivity,greedy,knapsack,random,cem,ppo,ddpg, separated by commas; by "
            "default all but greedy and knapsack."
        ),
    ] = None,
    evaluations: Evaluations = None,
    environment: Annotated[
        str | None, typer.Option(help="network (default: a whole plan at once) or layerwise.")
    ] = None,
    criterion: Criterion = None,
    rounding: Rounding = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option("--reconstruct/--no-reconstruct", help="Fit pruned layers by least squares; not by default."),
    ] = None,
    finetune_epochs: Annotated[
        int | None, typer.Option(help="Epochs of fine-tuning of every method's plan; 0 (default) for none.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default the next runs/NAME-N.")] = None,
    require_speedup: RequireSpeedup = False,
    as_json: AsJson = False,
) -> None:
    """Search how to compress a network under a budget, fine-tune what was found, and report."""
    from .outcome import missing_speedups
    from .run import RunExistsError, numbered_folder
    from .search import start_run

    options = {
        "model.name": model,
        "model.weights": weights,
        "data.source": data,
        "data.download": download,
        "budget": budget,
        "latency.table": latency_table,
        "search.methods": methods.split(",") if methods else None,
        "search.evaluations": evaluations,
        "search.environment": environment,
        "search.criterion": criterion,
        "search.rounding": rounding,
        "search.reconstruct": reconstruct,
        "search.seed": seed,
        "finetune.epochs": finetune_epochs,
        "device": device,
        "threads": threads,
    }
    resolved = _configuration(config, options, settings)
    stem = Path(config).stem if config else resolved.model.name.rpartition(":")[2]
    command = ["secateur", *sys.argv[1:]]

    def work(display: RunDisplay, stop: StopFlag) -> tuple[Path, RunOutcome]:
        while out is None:
            # Another run that is started at the same time may take the number first.
            with suppress(RunExistsError):
                root = numbered_folder(Path("runs"), stem)
                return root, start_run(resolved, root, command, display, stop)
        return out, start_run(resolved, out, command, display, stop)

    outcome = _run(as_json, work, resolved)
    _end_without_speedup(missing_speedups(outcome) if require_speedup else [])


@app.command()
def resume(
    run: RunPath,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value for one of finetune.*, measure.*, device, threads or data.download."),
    ] = None,
    require_speedup: RequireSpeedup = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run that was stopped or killed."""
    from .config import parse_setting
    from .outcome import missing_speedups
    from .search import resume_run

    changes = dict(map(parse_setting, settings or []))
    outcome = _run(as_json, lambda display, stop: (run, resume_run(run, display, stop, changes)))
    _end_without_speedup(missing_speedups(outcome) if require_speedup else [])


@app.command()
def report(run: RunPath, as_json: AsJson = False) -> None:
    """Rebuild report.html of a finished run, and print its table."""
    from .finish import rebuild_report
    from .run import RunFolder

    _run(as_json, lambda display, stop: (run, rebuild_report(RunFolder.open(run), display)))


@app.command()
def apply(
    source: Annotated[Path, typer.Argument(help="A policy (JSON), or the folder of a trained agent.")],
    config: Config = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    budget: BudgetText = None,
    latency_table: Table = None,
    criterion: Criterion = None,
    rounding: Rounding = None,
    evaluations: Annotated[
        int, typer.Option(min=0, help="Evaluations to refine an agent's plan with; 0 for none.")
    ] = 0,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder for the compressed network.")] = Path("compressed"),
    require_speedup: RequireSpeedup = False,
    as_json: AsJson = False,
) -> None:
    """Apply a saved policy to its network, or a trained agent, frozen, to another one."""
    from .apply import apply_saved
    from .config import ConfigError

    planned = {"--budget": budget, "--criterion": criterion, "--rounding": rounding}
    given = [name for name, value in planned.items() if value is not None]
    if given and source.suffix == ".json":
        msg = f"{' and '.join(given)}: for agents, which plan; the policy '{source}' is a plan, and is applied as it is"
        raise ConfigError(msg)
    options = {
        "model.name": model,
        "model.weights": weights,
        "data.source": data,
        "budget": budget,
        "latency.table": latency_table,
        "search.criterion": criterion,
        "search.rounding": rounding,
        "search.seed": seed,
        "device": device,
        "threads": threads,
    }
    resolved = _configuration(config, options, settings)
    facts = _tell(
        as_json,
        lambda display, stop: apply_saved(source, resolved, out, evaluations, display, stop),
        resolved,
        if_stopped="; evaluations are made anew" if evaluations else "",
    )
    _end_without_speedup([facts["no_speedup"]] if require_speedup and "no_speedup" in facts else [])


@app.command()
def finetune(
    source: Annotated[Path, typer.Argument(help="Folder of a compressed network, or of a run's method.")],
    config: Config = None,
    model: Annotated[
        str | None, typer.Option(help="As for search; by default the one that the folder names, if it is no function.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the dense network, for finetune.distillation_weight.")
    ] = None,
    data: Data = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images; to be given here or in the configuration.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder for the fine-tuned network.")] = Path("finetuned"),
    as_json: AsJson = False,
) -> None:
    """Fine-tune a compressed network."""
    from .standalone_training import finetune_saved

    options = {
        "model.name": model,
        "model.weights": weights,
        "data.source": data,
        "finetune.epochs": epochs,
        "search.seed": seed,
        "device": device,
        "threads": threads,
    }
    resolved = _configuration(config, options, settings)
    _tell(as_json, lambda display, stop: finetune_saved(source, resolved, out, display, stop), resolved)


@app.command()
def train(
    config: Config = None,
    model: Model = None,
    data: Data = None,
    download: Download = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images; 10 by default.")] = None,
    seed: Seed = None,
    device: Device = None,
    threads: Threads = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Weights to write, .safetensors.")] = Path("weights.safetensors"),
    as_json: AsJson = False,
) -> None:
    """Train a network from scratch."""
    from .standalone_training import train_named

    options = {
        "model.name": model,
        "data.source": data,
        "data.download": download,
        "train.epochs": epochs,
        "search.seed": seed,
        "device": device,
        "threads": threads,
    }
    resolved = _configuration(config, options, settings)
    _tell(as_json, lambda display, stop: train_named(resolved, out, display, stop), resolved)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="torchvision name, small_resnet, ... or package.module:function.")],
    shape: Shape = None,
    classes: Annotated[int, typer.Option(help="Outputs of the network.")] = 10,
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights, as for search; random ones if not given.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="As for search; none if not given.")] = None,
    latency_table: Table = None,
    rounding: Rounding = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, inputs and removals.")] = 0,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show what may be removed from a network and what may not, prove it, and tell whether a budget can be met."""
    from latency.budget import read_budgets

    from .check import check_named
    from .config import ConfigError, parse_setting

    keys = [parse_setting(text)[0] for text in settings or []]
    heeded = ("budget", "latency", "search")
    if others := [key for key in keys if key.partition(".")[0] not in heeded or key == "search.seed"]:
        msg = (
            f"--set {', '.join(others)}: check heeds budget, latency.* and search.* alone, and has --weights and --seed"
        )
        raise ConfigError(msg)
    config = _configuration(None, {"latency.table": latency_table, "search.rounding": rounding}, settings)
    budgets = config.budget if "budget" in keys and budget is None else read_budgets(budget)
    with _stdout_kept(as_json):
        found = check_named(model, shape, classes, weights, seed, config, budgets)
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="Image folder, or an archive of one.")],
    folder: Annotated[str, typer.Option(help="Folder of the split to divide.")] = "test",
    out: Annotated[Path, typer.Option(help="Where the lists are written.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Write lists of the even-numbered and the odd-numbered images of a folder."""
    from .image_folder import write_split_lists

    lists = [str(path) for path in write_split_lists(source, folder, out)]
    print(json.dumps(lists, indent=2) if as_json else "\n".join(lists))


latency = typer.Typer(help="Measured latency: of layers, as tables, and of what a run saved.", no_args_is_help=True)
app.add_typer(latency, name="latency")

Networks = Annotated[list[str], typer.Option("--model", help="As for search; may be given several times.")]
Classes = Annotated[int, typer.Option(help="Outputs of the network.")]
Host = Annotated[
    str | None, typer.Option(help="Measure on another machine, as ssh calls it; it needs Python and onnxruntime.")
]
Cpus = Annotated[str | None, typer.Option(help="Processors to stay on, by number: 0,1; all by default.")]
HostPython = Annotated[str, typer.Option(help="Python on the other machine.")]


@latency.command("build")
def latency_build(
    model: Networks,
    out: Annotated[Path, typer.Option(help="Table to write; one that is there is extended.")],
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, openvino, pytorch-eager, pytorch-compile, ...")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1)] = 1,
    cpus: Cpus = None,
    shape: Shape = None,
    classes: Classes = 10,
    rounding: Rounding = None,
    integers: Annotated[bool, typer.Option("--integers", help="Time every layer with 8 bits too.")] = False,
    networks: Annotated[
        int,
        typer.Option(
            help="Whole networks to calibrate with beside the dense one; with --integers each has two mixes beside it.",
            min=2,
        ),
    ] = 8,
    host: Host = None,
    host_python: HostPython = "python3",
    as_json: AsJson = False,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate", help="Time whole networks where the table is calibrated, too, and keep the better fit."
        ),
    ] = False,
) -> None:
    """Measure the layers of networks on this device; a build that was stopped goes on."""
    from .table_building import build_named
    from .timing_device import Remote, read_cpus

    built = [
        build_named(
            name,
            out,
            shape=shape,
            n_classes=classes,
            runtime=runtime,
            threads=threads,
            cpus=read_cpus(cpus),
            rounding=rounding,
            bits=(8, 32) if integers else (32,),
            n_networks=networks,
            recalibrate=recalibrate,
            remote=Remote(host, host_python) if host is not None else None,
            say=_to_stderr,
        )
        for name in model
    ]
    _print_facts(built, as_json)


@latency.command("check")
def latency_check(
    table: Annotated[Path, typer.Argument(help="What latency build wrote.")],
    model: Networks,
    policies: Annotated[int, typer.Option(help="Random policies of each network.", min=2)] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the policies.")] = 0,
    integers: Annotated[bool, typer.Option("--integers", help="Give layers 8 bits too, at random.")] = False,
    shape: Shape = None,
    classes: Classes = 10,
    rounding: Rounding = None,
    host: Host = None,
    host_python: HostPython = "python3",
    page: Annotated[Path | None, typer.Option(help="Page of Markdown to add the result to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a table with whole networks of random policies, timed as it was: error and rank correlation."""
    from .table_checking import check_table
    from .table_page import write_page
    from .timing_device import Remote

    checks = [
        check_table(
            table,
            name,
            shape=shape,
            n_classes=classes,
            rounding=rounding,
            n_policies=policies,
            seed=seed,
            integers=integers,
            remote=Remote(host, host_python) if host is not None else None,
            say=_to_stderr,
        )
        for name in model
    ]
    if page:
        write_page(page, checks, shlex.join(["secateur", *sys.argv[1:]]))
    _print_facts([check.to_dict() for check in checks], as_json)


@latency.command("measure")
def latency_measure(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, one or more.")],
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, openvino, pytorch-eager, pytorch-compile or sparse.")
    ] = "onnxruntime",
    threads: Annotated[
        list[int] | None, typer.Option(help="Threads of the runtime, by default 1; may be given several times.", min=1)
    ] = None,
    cpus: Cpus = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each network.", min=6)] = 100,
    host: Host = None,
    host_python: HostPython = "python3",
    as_json: AsJson = False,
) -> None:
    """Time what runs saved beside the first one's dense network, again and in turns."""
    from .measure_run import measure_runs, table_of
    from .outcome import plain_lines
    from .timing_device import Remote, read_cpus

    readings = measure_runs(
        runs,
        runtime=runtime,
        threads=threads or (1,),
        cpus=read_cpus(cpus),
        rounds=rounds,
        remote=Remote(host, host_python) if host is not None else None,
        say=_to_stderr,
    )
    if as_json:
        _print_facts([reading.to_dict() for reading in readings], as_json)
    else:
        print("\n".join(plain_lines(table_of(readings))))


def main() -> None:
    """Run the command; an error that a user can mend ends it with a message in place of a traceback."""
    logging.addLevelName(logging.WARNING, "warning")  # as the display of a run says it
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        app()
    except Exception as error:
        from graph_encoder.errors import SecateurError

        from .interrupt import Interrupted

        if isinstance(error, Interrupted):
            print(error, file=sys.stderr)
            sys.exit(130)
        # Of a path below a folder that may not be entered not even what is there can be asked.
        refused = ""
        if isinstance(error, PermissionError) and error.filename:
            refused = f"no permission for '{error.filename}': grant it, or name another"
        if not refused and not isinstance(error, SecateurError):
            raise
        print("\n".join([f"error: {refused or error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(1)


def _configuration(config: str | None, options: dict[str, Any], settings: list[str] | None) -> RunConfig:
    from .config import config_file, load_config, parse_setting

    given = {key: value for key, value in options.items() if value is not None}
    others = dict(parse_setting(text) for text in settings or [])
    resolved = load_config(config_file(config) if config else None, given | others)
    resolved.search.check_choices()
    return resolved


def _run(
    as_json: bool, work: Callable[[RunDisplay, StopFlag], tuple[Path, RunOutcome]], config: RunConfig | None = None
) -> RunOutcome:
    """Carry out a run, which gives its folder and outcome, and print it; ``config`` is that of a run which starts."""
    from rich.console import Console

    from .exported_files import ONNX_NAME
    from .interrupt import stop_on_signals
    from .outcome import headings, plain_lines, result_tables, speed_notes, table_cells
    from .progress import RunDisplay
    from .run import RunFolder

    with (
        RunDisplay(quiet=as_json) as display,
        stop_on_signals(_announcer(display)) as stop,
        _digits_told(config, display),
        _stdout_kept(as_json),
    ):
        root, outcome = work(display, stop)
    console = Console()
    if as_json:
        print(json.dumps({"run": str(root)} | outcome.model_dump(mode="json"), indent=2))
        return outcome
    if console.is_terminal:
        console.print(*result_tables(outcome, console.width), sep="\n")
    else:
        print("\n".join(plain_lines([headings(outcome), *table_cells(outcome)])))
    for note in speed_notes(outcome):
        print(note)
    for best in outcome.best(tuned=outcome.is_tuned)[:1]:
        folder = RunFolder(root).method(best.method).model
        print(f"best on the validation images: {best.method}, {folder / ONNX_NAME if best.onnx_bytes else folder}")
    return outcome


@contextmanager
def _stdout_kept(as_json: bool) -> Iterator[None]:
    """Send what a user's functions print to the other stream where the result is JSON."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def _end_without_speedup(missing: list[str]) -> None:
    """End the command with `NO_SPEEDUP` if any network is not faster than the dense one for sure."""
    if missing:
        print("\n".join(["no speed-up:", *(f"  {line}" for line in missing)]), file=sys.stderr)
        raise typer.Exit(NO_SPEEDUP)


def _tell(
    as_json: bool, work: Callable[[RunDisplay, StopFlag], dict[str, Any]], config: RunConfig, if_stopped: str = ""
) -> dict[str, Any]:
    """Carry out one step, and print and return what it returns; ``if_stopped`` is what a signal costs."""
    from .interrupt import Interrupted, stop_on_signals
    from .outcome import Speed
    from .progress import RunDisplay

    with (
        RunDisplay(quiet=as_json) as display,
        stop_on_signals(_announcer(display)) as stop,
        _digits_told(config, display),
    ):
        try:
            with _stdout_kept(as_json):
                facts = work(display, stop)
        except Interrupted as stopped:
            msg = (
                f"stopped by {stopped}; no result is written, and the same command continues a training that was "
                f"begun{if_stopped}"
            )
            raise Interrupted(msg) from None
    if as_json:
        print(json.dumps(facts, indent=2, default=Speed.to_dict))
    else:
        print("\n".join(_fact(name, value) for name, value in facts.items()))
    return facts


def _fact(name: str, value: Any) -> str:
    """A result as a line; all accuracies of single steps are those of the validation images."""
    from .outcome import Speed, percent

    label = name.replace("_", " ")
    if not name.startswith("validation_") and "accuracy" in name:
        label = f"{label} (validation)"
    if isinstance(value, Speed):
        return f"{label}: {value.verdict}, {value.quartiles}"
    if isinstance(value, float):
        return f"{label}: {percent(value)}"
    return f"{label}: {value:,}" if isinstance(value, int) else f"{label}: {value}"


@contextmanager
def _digits_told(config: RunConfig | None, display: RunDisplay) -> Iterator[None]:
    """Say that the images are the bundled digits where nobody chose any, also beside an error that this may explain."""
    from graph_encoder.network import TraceError

    from .models import ModelError, UnknownModelError
    from .subject import NearChanceError

    if config is None or config.data.is_chosen:
        yield
        return
    digits = "the bundled digits (gray, 28x28 pixels, 10 classes)"
    display.say(f"no --data given: taking {digits}")
    try:
        yield
    except (ModelError, NearChanceError, TraceError) as error:
        if not isinstance(error, UnknownModelError):
            error.add_note(f"no --data was given, so the images were {digits}; is this a network for them?")
        raise


def _announcer(display: RunDisplay) -> Callable[[str], None]:
    """What tells that a signal came in: the display, and standard error where the display is quiet."""
    return (lambda text: print(text, file=sys.stderr)) if display.console.quiet else display.say


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_facts(results: list[dict[str, Any]], as_json: bool) -> None:
    lines = [f"{name.replace('_', ' ')}: {value}" for facts in results for name, value in facts.items()]
    print(json.dumps(results, indent=2) if as_json else "\n".join(lines))


if __name__ == "__main__":
    main()
