"""What a run reports: numbers, wall time by phase, console, profiles, hangs.

JSON lines are the truth; TensorBoard, Weights & Biases, the console and the curves are views.
Host 0 writes and logs; the others are silent until they hang.
"""

from mofi_jax.telemetry.goodput import GOODPUT_FILE as GOODPUT_FILE
from mofi_jax.telemetry.goodput import PHASES as PHASES
from mofi_jax.telemetry.goodput import Goodput as Goodput
from mofi_jax.telemetry.goodput import process_start as process_start
from mofi_jax.telemetry.meter import Console as Console
from mofi_jax.telemetry.meter import Meter as Meter
from mofi_jax.telemetry.metrics import NAN_FILE as NAN_FILE
from mofi_jax.telemetry.metrics import TIMED as TIMED
from mofi_jax.telemetry.metrics import Metrics as Metrics
from mofi_jax.telemetry.metrics_file import METRICS_FILE as METRICS_FILE
from mofi_jax.telemetry.metrics_file import read_metrics as read_metrics
from mofi_jax.telemetry.profile import Profile as Profile
from mofi_jax.telemetry.tracking import open_wandb as open_wandb
from mofi_jax.telemetry.tracking import require_wandb as require_wandb
from mofi_jax.telemetry.watchdog import Watchdog as Watchdog
