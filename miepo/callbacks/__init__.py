"""What a run shows and keeps: obedience, the Pareto front, the information, samples, throughput, the table, answers."""

from miepo.callbacks.collapse_guard import CollapseGuard
from miepo.callbacks.evaluation_callback import EvaluationCallback
from miepo.callbacks.evaluation_record import EvaluationRecord
from miepo.callbacks.evaluation_table import EvaluationTable
from miepo.callbacks.pareto_front import ParetoFront
from miepo.callbacks.preference_information import PreferenceInformation
from miepo.callbacks.progress_log import ProgressLog
from miepo.callbacks.response_writer import ResponseWriter
from miepo.callbacks.sample_table import SampleTable
from miepo.callbacks.steerability import Steerability
from miepo.callbacks.throughput import Throughput
from miepo.training.run_checkpoint import RunCheckpoint

__all__ = [
    "CollapseGuard",
    "EvaluationCallback",
    "EvaluationRecord",
    "EvaluationTable",
    "ParetoFront",
    "PreferenceInformation",
    "ProgressLog",
    "ResponseWriter",
    "RunCheckpoint",
    "SampleTable",
    "Steerability",
    "Throughput",
]
