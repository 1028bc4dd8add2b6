"""The configuration of a run: a frozen tree read from a YAML file, from options, or from both."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from agent.config import AgentConfig, DDPGConfig, PPOConfig
from envs.reward import GALEN, GALEN_BETA, REWARDS
from graph_encoder.errors import SecateurError
from latency.budget import Budget, read_budgets
from latency.decision import DENSITIES, LayerChoice
from pruning.calibration import RangeMethod
from pruning.importance import Criterion
from pruning.layer_policy import FULL_BITS, LayerPolicy

from .data import DataRecipe
from .user_function import is_reference

Method = Literal["uniform", "magnitude", "sensitivity", "greedy", "knapsack", "random", "cem", "ppo", "ddpg"]
Environment = Literal["network", "layerwise"]
Decision = Literal["channels", LayerChoice]
Start = Literal["sensitivity", "uniform"]

METHODS: tuple[Method, ...] = get_args(Method)
PROBING: tuple[Method, ...] = ("sensitivity", "greedy", "knapsack")
"""Methods whose plan follows from the sensitivity probes."""
AGENTS: tuple[Method, ...] = ("ppo", "ddpg")
ONE_SHOT: tuple[Method, ...] = ("uniform", "magnitude", "sensitivity", "greedy", "knapsack")
"""Methods that propose a single plan and so need a single evaluation."""

ConfigT = TypeVar("ConfigT", bound=BaseModel)

_FOR_TRANSFER: dict[str, dict[str, Any]] = {
    # An agent that is applied, frozen, corrects the uniform plan, and sees nothing that would cost evaluations.
    "search": {"start": "uniform", "measured_dropout": 0.5},
    "ppo": {"n_frequencies": 0},
    "ddpg": {"n_frequencies": 0},
}
"""What `SearchSettings.for_transfer` sets where nobody did, by section."""

_SHORT: dict[str, str] = {"model": "name", "data": "source"}
"""Sections that may be written as one text, and the key that it stands for: ``model: resnet20``."""


class ConfigError(SecateurError, ValueError):
    """A configuration key, option or value that cannot be used; the message names what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(_Section):
    """The network to compress."""

    name: str = "small_resnet"
    """A torchvision name, a bundled network (small_resnet, resnet20, resnet56, ...) or package.module:function."""
    weights: Path | None = None
    """Trained weights: safetensors, or .pt/.pth read weights-only; none trains the network with `train` first."""


class SearchSettings(_Section):
    """What is searched, how long, and how a candidate is scored."""

    methods: tuple[Method, ...] = ("uniform", "magnitude", "sensitivity", "random", "cem", "ppo", "ddpg")
    """Methods to compare, those that search with the same number of evaluations each; greedy and knapsack can be named
    too. Where no channels are named in decide, magnitude, which ranks them, is left out unless it is named."""
    evaluations: int = Field(default=300, ge=1)
    """Evaluations of one method, its probes and finalists included: a candidate built, repaired and scored."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the methods, the data order and the training."""
    environment: Environment = "network"
    """A plan for the whole network at once, or layer by layer (agents only)."""
    decide: tuple[Decision, ...] = ("channels",)
    """What is decided: channels of each group; inside each layer the density of its weights, and the bits of weights
    and of what is read, together (bits) or apart (weight_bits, act_bits)."""
    sparsity: str = "unstructured"
    """Pattern of the zeros where density is decided: unstructured, block4, block8, block16, or N:M such as 2:4."""
    densities: tuple[int, ...] = DENSITIES
    """Percents of a layer's weights that may stay, ascending; 100 leaves a layer as it is."""
    bits: tuple[int, ...] = (8, FULL_BITS)
    """Bits that may be chosen, ascending; 8 and 32 are what runtimes compute with, below 8 is simulated. 32 leaves a
    layer as it is: without it, every layer is quantized."""
    reduce_range: bool | None = None
    """Let 8-bit weights beside 8-bit activations take half of their levels, so that no sum of two products saturates on
    x86 processors without VNNI; unset goes by the processor of the latency table, else by this one, if bits are decided
    together and none are fewer than 8."""
    start: Start = "sensitivity"
    """The plan that every searching method starts from; the probes it takes count as evaluations of each."""
    show_sensitivity: bool = False
    """Show agents what the probes found where the start is uniform too; the probes then count for each of them."""
    probe_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the search images that the sensitivity probes use; they count as that share."""
    criterion: Criterion = "l1"
    """Importance by which the channels of a group are ranked."""
    rounding: int | None = Field(default=None, ge=1)
    """Units a group keeps are a multiple of this; unset means 8 where a group has 128 units or more, else 1."""
    min_keep_ratio: float = Field(default=0.1, ge=0, le=1)
    """Least share of a group that stays."""
    protect_first: bool = True
    """Leave the first layer's outputs dense (the last layer's are the network's own and always stay)."""
    protected: tuple[str, ...] = ()
    """Further groups to leave dense."""
    span: float = Field(default=0.5, gt=0)
    """How far an action of 1 moves a keep ratio from the start plan under a budget; bits by that share of their
    ladder."""
    reward: str | None = None
    """accuracy, accuracy_guaranteed (AMC; taken where there is no budget), galen (without a budget only), or
    package.module:function; unset goes by the budget."""
    target: Budget | None = None
    """Cost that the reward galen aims at, as a budget is written: ``20% latency``."""
    beta: float = Field(default=GALEN_BETA, lt=0)
    """What missing that target by its own size is worth, in accuracy: at -1 one percent weighs one point."""
    measured_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of an agent's episodes that do not show the probes' result, so that it learns to do without."""
    for_transfer: bool = False
    """Train agents to plan other networks: the start is uniform, measured_dropout 0.5 and the agents' n_frequencies 0,
    each unless it is set."""
    reconstruct: bool = False
    """Fit the pruned layers' outputs to the dense network's by least squares (AMC) before scoring."""
    search_images: int = Field(default=5000, ge=1)
    """Validation images a candidate is scored on; all if there are fewer. A search overfits to few of them."""
    calibration_images: int = Field(default=1000, ge=1)
    """Training images for re-estimating batch-norm statistics, and for reconstruction as many of them as fit into
    memory at once."""
    calibration_method: RangeMethod = "mse"
    """How ranges of activations are chosen where layers have bits: minmax, percentile, entropy, mse, or lsq before
    training; of candidates and of the networks that are saved."""
    finalists: int = Field(default=3, ge=1)
    """Best plans of each method that are scored again on the whole validation split."""
    batch_size: int = Field(default=250, ge=1)
    """Images a forward pass while scoring, and a batch when batch-norm statistics are re-estimated."""
    autocast: bool = False
    """Re-estimate statistics and score candidates in bfloat16, if that is faster on the device; where bits are decided
    the former alone, since its own rounding is about that of 8 bits."""

    @field_validator("target", mode="before")
    @classmethod
    def _target_as_text(cls, target: object) -> object:
        return Budget.parse(target) if isinstance(target, str | float | int) else target

    @field_validator("decide")
    @classmethod
    def _decides_something_once(cls, decide: tuple[Decision, ...]) -> tuple[Decision, ...]:
        if not decide or len(set(decide)) != len(decide):
            msg = f"name what is decided, each once; found {', '.join(decide) or 'nothing'}"
            raise ValueError(msg)
        if "bits" in decide and {"weight_bits", "act_bits"} & set(decide):
            msg = "bits decides weights and activations together; leave it out to decide weight_bits and act_bits apart"
            raise ValueError(msg)
        return decide

    @field_validator("sparsity")
    @classmethod
    def _is_a_pattern(cls, sparsity: str) -> str:
        if LayerPolicy(sparsity).sparsity == "dense":
            msg = "sparsity is the pattern that zeros follow; to decide no density, leave it out of search.decide"
            raise ValueError(msg)
        return sparsity

    @field_validator("reward")
    @classmethod
    def _is_a_reward(cls, reward: str | None) -> str | None:
        known = [*REWARDS, GALEN]
        if reward is not None and reward not in known and not is_reference(reward):
            msg = f"unknown reward '{reward}'{_nearest(reward, known)}, or package.module:function"
            raise ValueError(msg)
        return reward

    def check_choices(self) -> None:
        """Raise `ConfigError` where levels or patterns are chosen for what is not decided: they would do nothing."""
        choices = {
            "sparsity": ("density", "density" in self.decide),
            "densities": ("density", "density" in self.decide),
            "bits": ("bits, weight_bits or act_bits", self.decides_bits),
            "reduce_range": ("bits", self.decides_bits),
        }
        for name, (decision, is_decided) in choices.items():
            value = getattr(self, name)
            if not is_decided and value != type(self).model_fields[name].default:
                found = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                msg = (
                    f"search.{name} is {found}, and search.decide names no {decision}: add it to search.decide, or "
                    f"leave {name} out"
                )
                raise ConfigError(msg)

    @property
    def layer_choices(self) -> tuple[LayerChoice, ...]:
        """What is decided inside layers."""
        return tuple(choice for choice in self.decide if choice != "channels")

    @property
    def decides_bits(self) -> bool:
        """Whether bits are among what is decided inside layers."""
        return bool({"bits", "weight_bits", "act_bits"} & set(self.decide))

    @property
    def decides_integers(self) -> bool:
        """Whether plans hold layers of 8 bits, and bits that runtimes compute with alone."""
        return "bits" in self.decide and min(self.bits, default=0) == 8

    @property
    def scores_in_bfloat16(self) -> bool:
        """What `autocast` comes to for scores: a layer left in single precision must be told from one of 8 bits."""
        return self.autocast and not self.decides_bits

    @property
    def starts_from_probes(self) -> bool:
        """Whether the plan that searching methods start from follows from the sensitivity probes."""
        return self.start == "sensitivity"

    @property
    def agents_see_probes(self) -> bool:
        """Whether agents are shown what the sensitivity probes found."""
        return self.starts_from_probes or self.show_sensitivity

    def uses_probes(self, method: Method) -> bool:
        """Whether a method needs the sensitivity probes, which then count for it: follows, starts from or sees them."""
        starts_there = self.starts_from_probes and method not in ONE_SHOT
        return method in PROBING or starts_there or (self.agents_see_probes and method in AGENTS)

    @field_validator("methods")
    @classmethod
    def _no_repeats(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        if not methods:
            msg = f"at least one method is needed; allowed: {', '.join(METHODS)}"
            raise ValueError(msg)
        if len(set(methods)) != len(methods):
            msg = f"each method may be named once; found {', '.join(methods)}"
            raise ValueError(msg)
        return methods


class TrainConfig(_Section):
    """Training from scratch, for a network that has no weights."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the training images."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate of the cosine schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty."""
    batch_size: int = Field(default=128, ge=1)
    """Images a step."""
    autocast: bool = False
    """Train in bfloat16, if that is faster on the device; without effect on epochs in which layers have bits."""


class FinetuneConfig(TrainConfig):
    """Fine-tuning, the same for every method's plan; 0 epochs leaves it out."""

    epochs: int = Field(default=0, ge=0)
    """Passes over the training images; 0 fine-tunes nothing."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Peak learning rate of the cosine schedule."""
    quantized_epochs: int | None = Field(default=None, ge=0)
    """How many of the epochs, the last ones, are trained with the bits that layers have, after others without, which
    take less than half as long: ranges are calibrated in between, and the learning rate falls to a tenth and runs along
    a cosine of its own. All if not given; with 0 the ranges are calibrated in the end."""
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that follows the dense network's outputs; 0 trains on the labels alone."""
    temperature: float = Field(default=4.0, gt=0)
    """Softening of the outputs that distillation compares."""
    dense_control: bool = True
    """Give the dense network the same fine-tuning and report it beside the others."""

    @model_validator(mode="after")
    def _quantized_epochs_are_some_of_all(self) -> Self:
        if 0 < self.epochs < (self.quantized_epochs or 0):
            msg = (
                f"quantized_epochs is {self.quantized_epochs}, and epochs, which they are the last of, {self.epochs}; "
                f"ask for at most {self.epochs} of them, or for more epochs"
            )
            raise ValueError(msg)
        return self


class LatencyConfig(_Section):
    """Where a budget of latency reads times; see `secateur latency build`."""

    table: Path | None = None
    """Table of the device that the network is for, with the layers of this network."""
    clock: bool = True
    """Keep the budget on the clock too: plans are timed on the table's device, searches spend what the clock finds the
    budget to be by the table, and plans are made smaller where they are over it. False keeps it by the table alone, so
    that a search depends on no reading and repeats."""


class MeasureConfig(_Section):
    """Timing of the finished networks."""

    n_runs: int = Field(default=30, ge=5)
    """Timed calls of each network, interleaved."""
    batch_size: int = Field(default=1, ge=1)
    """Images a call."""
    onnx: bool = True
    """Write each network as ONNX too, and time it on ONNX Runtime."""
    program: bool = False
    """Write each network as an exported program of PyTorch too, model.pt2; it takes seconds a network."""


class RunConfig(_Section):
    """Everything that decides what a run does."""

    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataRecipe = DataRecipe()
    """Images, their splits and their preparation."""
    budget: tuple[Budget, ...] = (Budget(share=0.5),)
    """The cost that no plan may exceed, as ``50%``, ``30% params``, ``62.7M macs``, or several at once, each of another
    kind: ``50% macs, 20% bytes``; none weighs cost in the reward."""
    search: SearchSettings = SearchSettings()
    """The search."""
    train: TrainConfig = TrainConfig()
    """Training of a network without weights."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Fine-tuning of the plans found."""
    ppo: PPOConfig = PPOConfig()
    """The agent PPO."""
    ddpg: DDPGConfig = DDPGConfig()
    """The agent DDPG."""
    latency: LatencyConfig = LatencyConfig()
    """Budgets of latency."""
    measure: MeasureConfig = MeasureConfig()
    """Timing."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1, mps."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes OMP_NUM_THREADS where it is set, else as many as there are cores. A run keeps its number."""

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_as_text(cls, budget: object) -> object:
        listed: Sequence[Any] = budget if isinstance(budget, list | tuple) else [] if budget is None else [budget]
        # What a run wrote is read back as mappings.
        return read_budgets([Budget.model_validate(one) if isinstance(one, dict) else one for one in listed])

    @model_validator(mode="after")
    def _budget_where_needed(self) -> Self:
        needing = [method for method in self.search.methods if method in ONE_SHOT]
        if not self.budget and needing:
            searching = [method for method in METHODS if method not in ONE_SHOT]
            msg = f"search.methods: {', '.join(needing)} need a budget; without one choose among {', '.join(searching)}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _target_where_aimed_at(self) -> Self:
        search, budgets = self.search, ", ".join(map(str, self.budget))
        if search.reward == GALEN and (search.target is None or self.budget):
            found = "no search.target" if search.target is None else f"the budget {budgets}"
            msg = (
                f"search.reward: {GALEN} aims at search.target and takes no budget; found {found}. Set search.target, "
                "such as '20% latency', and budget none"
            )
            raise ValueError(msg)
        if search.reward != GALEN and search.target is not None:
            msg = (
                f"search.target: {search.target} is what the reward {GALEN} aims at; set search.reward to {GALEN}, or "
                "pass a budget, which every plan keeps"
            )
            raise ValueError(msg)
        return self

    def agent(self, method: str) -> AgentConfig | None:
        """Hyper-parameters of a method, None if it is no agent."""
        return {"ppo": self.ppo, "ddpg": self.ddpg}.get(method)

    def settled(self) -> Self:
        """The same, with what `SearchSettings.for_transfer` asks for where nothing was chosen."""
        if not self.search.for_transfer:
            return self
        sections = {name: getattr(self, name) for name in _FOR_TRANSFER}
        left = {
            name: {key: value for key, value in _FOR_TRANSFER[name].items() if key not in section.model_fields_set}
            for name, section in sections.items()
        }
        return self.model_copy(update={name: sections[name].model_copy(update=left[name]) for name in sections})

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path | None = None, options: Mapping[str, Any] | None = None) -> RunConfig:
    """Read the configuration of a run; see `load_as`."""
    return load_as(RunConfig, path, options).settled()


def load_as(kind: type[ConfigT], path: Path | None, options: Mapping[str, Any] | None = None) -> ConfigT:
    """Read a configuration.

    Args:
        kind: what it is of: a run, or an experiment with keys of its own.
        path: YAML file; none starts from the defaults.
        options: dotted key to value (``{"search.seed": 3}``), which override the file; None is a value like others.

    Raises:
        ConfigError: if a key is unknown or a value cannot be used; the message names the nearest valid key.
    """
    tree = _read_yaml(path) if path else {}
    # A section of which every key is commented out is empty.
    tree = {key: {} if value is None and _is_section(kind, key) else value for key, value in tree.items()}
    for section in _SHORT.keys() & tree.keys():
        _put(tree, section, tree.pop(section))
    for key, value in (options or {}).items():
        _put(tree, key, value)
    return validated(kind, tree, str(path) if path else "the options")


def config_file(name: str, experiment: str = "") -> Path:
    """The file meant by ``name``: a path, or the name of a configuration that comes with the project.

    Args:
        name: of a file, or of a bundled configuration.
        experiment: whose configurations are meant, which have keys of their own; those of runs if not given.

    Raises:
        ConfigError: if there is neither.
    """
    folder = Path(__file__).parent / "configs" / experiment
    bundled = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in bundled and not Path(name).is_file():
        return bundled[name]
    if Path(name).is_file() or Path(name).suffix:
        return Path(name)
    msg = f"there is no file and no bundled configuration called '{name}'{_nearest(name, list(bundled))}"
    raise ConfigError(msg)


def validated(model: type[ConfigT], tree: Mapping[str, Any], source: str) -> ConfigT:
    """``model`` built from ``tree``, every fault told in one `ConfigError` that names ``source``."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(model, detail) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults)) from error


def parse_setting(text: str) -> tuple[str, Any]:
    """Key and value of ``--set search.finalists=5``; the value is read as YAML.

    Raises:
        ConfigError: if there is no ``=`` or no key before it, or the value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(map(str.strip, key.split("."))):
        lacking = f"no key in '{key}' before its '='" if equals else "no '='"
        msg = f"--set '{text}' has {lacking}; write it as section.key=value, for example search.finalists=5"
        raise ConfigError(msg)
    return key.strip(), _parsed(value, f"the value in --set '{text}'")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        msg = f"configuration file {path} does not exist"
        raise ConfigError(msg) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        msg = f"cannot read the configuration file {path}: {reason}; data is named with --data"
        raise ConfigError(msg) from error
    tree = _parsed(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        msg = (
            f"{path} holds {type(tree).__name__}; a mapping with the keys {', '.join(RunConfig.model_fields)} is needed"
        )
        raise ConfigError(msg)
    return tree


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice, and ``2:4`` is a text.

    PyYAML takes the last of equal keys, and follows version 1.1, where 2:4 is 124, written to the base of 60.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return self.DEFAULT_SCALAR_TAG if tag in _NUMBERS and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in found:
                    msg = f"the key '{key.value}' stands again in line {key.start_mark.line + 1}; keep one of them"
                    raise yaml.YAMLError(msg)
                found.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        msg = f"{source} is not valid YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    if key in _SHORT and isinstance(value, str):
        key = f"{key}.{_SHORT[key]}"
    *sections, last = key.split(".")
    for section in sections:
        below = {} if tree.get(section) is None else tree[section]
        if not isinstance(below, dict):
            msg = f"'{key}' cannot be set, as '{section}' is {below!r} and no section; set '{section}' as a whole"
            raise ConfigError(msg)
        tree[section] = dict(below)  # an option that is a section stays as it was given
        tree = tree[section]
    tree[last] = value


def _fault(model: type[BaseModel], detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if not where:
        return _sentence(detail)
    if detail["type"] == "value_error":
        return f"{where}: {_sentence(detail)}"  # ours, which quotes what was found
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{where}: '{detail['input']}' is not allowed{_nearest(str(detail['input']), allowed)}"
    if detail["type"] in ("tuple_type", "list_type"):
        return f"{where}: {_sentence(detail)}; found {detail['input']!r}, write a list: [{detail['input']}]"
    if detail["type"] != "extra_forbidden":
        return f"{where}: {_sentence(detail)}; found {detail['input']!r}"
    *parents, key = detail["loc"]
    names = list(_section_at(model, parents).model_fields)
    section = f"'{'.'.join(str(part) for part in parents)}'" if parents else "the top level"
    return f"unknown key '{key}' in {section}{_nearest(str(key), names)}"


def _sentence(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _is_section(model: type[BaseModel], key: str) -> bool:
    annotation = model.model_fields[key].annotation if key in model.model_fields else None
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_at(model: type[BaseModel], parents: Sequence[int | str]) -> type[BaseModel]:
    for part in parents:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        candidates = (annotation, *get_args(annotation))
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{hint} Allowed: {', '.join(allowed)}"
