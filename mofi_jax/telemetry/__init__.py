"""What a run reports: numbers, wall time by phase, console, profiles, hangs.

JSON lines are the truth; TensorBoard, Weights & Biases, the console and the curves are views.
Host 0 writes and logs; the others are silent until they hang.
"""

from mofi_jax.telemetry.goodput import GOODPUT_FILE, PHASES, Goodput, process_start
from mofi_jax.telemetry.meter import Meter
from mofi_jax.telemetry.metrics import NAN_FILE, TIMED, Metrics
from mofi_jax.telemetry.metrics_file import METRICS_FILE, read_metrics
from mofi_jax.telemetry.profile import Profile
from mofi_jax.telemetry.progress import Progress, parts_of, periods_in_words
from mofi_jax.telemetry.tracking import open_wandb, require_wandb
from mofi_jax.telemetry.watchdog import Watchdog
