"""Errors that a user can mend; anything else is a fault of ours and keeps its traceback."""

from envs.evaluator import EvaluateError, ReplayError
from envs.journal import JournalError
from envs.reward import RewardError
from graph_encoder.network import TraceError
from latency.budget import BudgetError
from latency.runtimes import LatencyError
from pruning.calibration import CalibrationError
from pruning.export import ExportError
from pruning.files import CheckpointError, FileWriteError
from pruning.finetune import FinetuneError
from pruning.policy import PolicyError

from .config import ConfigError
from .data import DataError
from .machine import DeviceError
from .models import ModelError
from .run import RunError
from .subject import NearChanceError
from .user_function import UserFunctionError

USER_ERRORS = (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    EvaluateError,
    ExportError,
    FileWriteError,
    FinetuneError,
    JournalError,
    LatencyError,
    ModelError,
    NearChanceError,
    PolicyError,
    ReplayError,
    RewardError,
    RunError,
    TraceError,
    UserFunctionError,
)
