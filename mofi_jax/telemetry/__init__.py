"""What a run says about itself; a folder of one-job files, used as ``telemetry.NAME``.

JSON lines are the truth; TensorBoard, Weights & Biases, the console and the drawn curves are views.
Host 0 writes and speaks; the others stay silent until they hang.
"""

from mofi_jax.common.files import write_json, write_text
from mofi_jax.telemetry.console import Console
from mofi_jax.telemetry.goodput import GOODPUT_FILE, PHASES, Goodput, process_start
from mofi_jax.telemetry.meter import Meter
from mofi_jax.telemetry.metrics import METRICS_FILE, NAN_FILE, TIMED, Metrics, read_metrics
from mofi_jax.telemetry.profile import Profile
from mofi_jax.telemetry.tracking import open_wandb, require_wandb
from mofi_jax.telemetry.watchdog import Watchdog

__all__ = [
    "GOODPUT_FILE",
    "METRICS_FILE",
    "NAN_FILE",
    "PHASES",
    "TIMED",
    "Console",
    "Goodput",
    "Meter",
    "Metrics",
    "Profile",
    "Watchdog",
    "open_wandb",
    "process_start",
    "read_metrics",
    "require_wandb",
    "write_json",
    "write_text",
]
