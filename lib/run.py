"""What every run needs: devices, processes, signals, limits of settings, files of its folder."""

import contextlib
import faulthandler
import glob
import importlib.metadata
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import UserError
from lib.sandbox import describe_isolation


def print0(*words) -> None:
    """Print on rank 0 only, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


# ----------------------------------------------------------------------------------------------
# devices and processes


def pick_device(device: str, dtype: str, dry_run: bool = False) -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype that two settings name.

    "auto" is cuda where there is a GPU, else cpu; and bfloat16 on GPUs that compute it, else
    float32. dry_run: arithmetic needs no GPU, so what is wrong with the GPUs is only printed, and
    the device is cpu.
    Raises UserError for another name, and for what gpu_trouble() finds.
    """
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(
            f"device={device!r}, dtype={dtype!r}: "
            "'auto', 'cpu' or 'cuda'; 'auto', 'bfloat16' or 'float32'"
        )
    trouble = gpu_trouble(device, dtype)
    if trouble and not dry_run:
        # On several nodes, a process of each node with this trouble says so.
        raise UserError(trouble, rank_local=local_rank() == 0)
    if trouble:
        print0(f"nothing will run on a GPU: {trouble}")

    cuda = device != "cpu" and torch.cuda.is_available() and not trouble
    if dtype == "auto":
        dtype = "bfloat16" if cuda and computes_bfloat16() else "float32"
    if not cuda:
        if not dry_run:
            share_cores()
        return torch.device("cpu"), getattr(torch, dtype)

    gpu = torch.device("cuda", local_rank())
    torch.cuda.set_device(gpu)
    return gpu, getattr(torch, dtype)


def gpu_trouble(device: str, dtype: str) -> str | None:
    """Why this process cannot have a GPU of its own, as the settings want it; None if it can."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        seen = f"torch {torch.__version__}, {build}, sees no GPU here"
        if has_nvidia_gpu():
            return (
                f"there is an NVIDIA GPU, but {seen}: update the driver (CUDA 13 needs 580 or "
                "newer), install a CUDA build of torch, or choose --device=cpu"
            )
        if device == "cuda":
            return f"device='cuda', but {seen}: install a CUDA build, or choose --device=cpu"
        return None

    processes = local_processes()
    gpus = torch.cuda.device_count()
    if processes > gpus:
        return (
            f"{processes} processes on this machine, but torch sees {gpu_count(gpus)} here: "
            f"start one process per GPU (--nproc_per_node {gpus}), or choose --device=cpu"
        )
    if dtype == "bfloat16" and not computes_bfloat16():
        return "dtype='bfloat16' needs a GPU of compute capability 8.0 (Ampere): --dtype=float32"
    return None


def has_nvidia_gpu() -> bool:
    """Is there an NVIDIA GPU, whether torch can use it or not, that the user has not hidden?"""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    # Elsewhere, in WSL for example, the driver's own tool knows. Without a GPU it fails.
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    return listed.returncode == 0


def computes_bfloat16() -> bool:
    """Do this process's GPU and the kernels for it know bfloat16? Older ones than Ampere do not."""
    return torch.cuda.get_device_capability(local_rank()) >= (8, 0)


def share_cores() -> None:
    """Leave this process no more threads than its share of the cores, unless the user has chosen.

    torchrun starts several processes with one thread each, a single process has one per core. What
    is mended here is that torch counts all cores of a machine of which a container has a part, and
    that other launchers than torchrun do not share. Sums of floats depend on the threads: their
    number changes the last digits of a run.
    """
    chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    share = max(1, cores() // local_processes())
    if not chosen and torch.get_num_threads() > share:
        torch.set_num_threads(share)

    # Threads that spin while they wait for one that another program keeps from its core. The
    # variable is read when torch is loaded: it is too late to set it here.
    if torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        print0(
            f"note: {torch.get_num_threads()} threads per process on {cores()} cores. While other "
            "programs use the cores, sampling can take ten times as long, unless "
            "OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1 is set in the environment"
        )


def cores() -> int:
    """The CPU cores that this process may use: of a container, its part of the machine's."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))

    # Linux's limit of a container: microseconds of computation, or "max", per so many.
    with contextlib.suppress(OSError, ValueError):
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(allowed) / int(period)))
    return max(1, count)


def machine_words(device: torch.device) -> str:
    """What a run computes on, for its first lines: "8 x cuda", "2 x cpu (1 of 2 cores each)"."""
    words = f"{dist.get_world_size()} x {device.type}"
    if device.type == "cuda":
        return words
    return f"{words} ({torch.get_num_threads()} of {cores()} cores each)"


def gpu_count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_processes() -> int:
    """How many processes of this run are on this machine; at least those before this one."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank() + 1)


def setup_distributed(device: torch.device, minutes: float = 60) -> tuple[int, int]:
    """Join the process group that torchrun describes, or make one of a single process.

    Returns (rank, world size). A collective that waits longer than `minutes` ends the run.
    """
    if "RANK" not in os.environ:
        os.environ["RANK"] = "0"
        os.environ["LOCAL_RANK"] = "0"
        os.environ["WORLD_SIZE"] = "1"
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = "0"

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))

    # NCCL's watchdog aborts a process that hangs: then show on stderr (2) where it was.
    faulthandler.enable(2)
    return dist.get_rank(), dist.get_world_size()


def leave_distributed() -> None:
    """Leave the process group, once all processes have come here. Collective.

    A thread of gloo may still be giving back the last collective's tensors, for which it takes
    Python's lock. If the interpreter is ending by then, the process aborts: so it ends by
    os._exit(), as in configurator.run().
    """
    if not dist.is_initialized():
        return
    # Who leaves closes its connections, over which another may still be receiving. The tensor is on
    # the CPU, where all processes can wait for each other, whatever their GPUs do.
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


# What gloo says when the other end of a connection is gone.
LOST_CONNECTION = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Connection refused",
    "Broken pipe",
)


@contextlib.contextmanager
def waiting_for(phase, minutes: float):
    """Name the phase in which another process did not arrive in time, or was gone.

    phase: a text, or an object that becomes one when it is asked, such as a Stopwatch.
    Raises UserError for a collective of gloo that timed out, or lost its connection. (NCCL ends the
    process by itself.)
    """
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1:
            raise
        # "Timed out" or "timed out", depending on the collective.
        if "imed out" in str(error):
            what = f"a process did not come within timeout_minutes={minutes}"
        elif any(words in str(error) for words in LOST_CONNECTION):
            what = (
                f"rank {dist.get_rank()} has lost another process, which says why, or torchrun "
                "does; the same command goes on from the last checkpoint"
            )
        else:
            raise
        raise UserError(f"{phase}: {what}", rank_local=True) from error


def all_sum(value: float, device: torch.device) -> float:
    """The sum of a number over all processes. Collective."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def on_first_rank(function: Callable):
    """Call function() on rank 0 and return its result on every rank. Collective.

    If it raises, every rank raises: rank 0 the exception itself, the others a UserError.
    """
    result, message, error = None, None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as e:
            error = e
            message = str(e)

    both = [result, message]
    dist.broadcast_object_list(both)
    result, message = both
    if error is not None:
        raise error
    if message is not None:
        raise UserError(message)
    return result


def join_ranks(gpus_each: int) -> tuple[int, int, Callable[[str], None]]:
    """What torchrun describes, without a process group: (rank, world size, wait).

    wait(word) returns when every process has called it. There is no process group, because the
    end of a vLLM engine would end it. Each process keeps `gpus_each` GPUs for itself; 0: the run
    is one on the CPU. Raises UserError if there are too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda word: None

    if gpus_each:
        keep_own_gpus(gpus_each)
    store, rank, world_size = next(dist.rendezvous("env://"))
    # Otherwise vLLM would look for its own process group in torchrun's store.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)

    def wait(word):
        store.set(f"{word} {rank}", "here")
        everybody = [f"{word} {other}" for other in range(world_size)]
        store.wait(everybody, timedelta(days=7))

    return rank, world_size, wait


def keep_own_gpus(gpus_each: int) -> None:
    """Show this process only its own GPUs, by CUDA_VISIBLE_DEVICES.

    Raises UserError, in every process of this machine, if there are too few.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(count)]
    gpus = gpus[:count]

    processes = local_processes()
    if gpus and processes * gpus_each > count:
        raise UserError(
            f"{processes} processes on this machine with {gpu_count(gpus_each)} each, but torch "
            f"sees {gpu_count(count)} here: start fewer processes, set a smaller tensor_parallel, "
            "or choose --device=cpu",
            rank_local=local_rank() == 0,
        )

    first = local_rank() * gpus_each
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + gpus_each])
    os.environ["LOCAL_RANK"] = "0"
    if gpus:
        # From here on this process is alone with its GPUs. (Cores are still shared.)
        os.environ["LOCAL_WORLD_SIZE"] = "1"


def catch_signals() -> list[int]:
    """A list that receives the numbers of SIGTERM and Ctrl-C.

    The loop looks at it between steps, saves and ends. A Ctrl-C after the first signal ends the
    run at once. (A second SIGTERM does not: torchrun passes its own on to processes that may
    already have had one.)
    """
    received = []

    def handler(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return received


# ----------------------------------------------------------------------------------------------
# settings


def check_limits(settings: dict, least: dict, **choices) -> None:
    """Raise UserError if a setting is less than its value in `least`, or none of its choices."""
    for name, values in choices.items():
        if settings[name] not in values:
            expected = ", ".join(repr(value) for value in values)
            raise UserError(f"{name}={settings[name]!r}: one of {expected}")
    for name, value in least.items():
        if settings[name] is not None and settings[name] < value:
            raise UserError(f"{name}={settings[name]}: at least {value}")


def is_due(interval: int, steps_done: int, last_step: int) -> bool:
    """Every `interval` steps, and after the last one; 0 is never."""
    return bool(interval) and (steps_done % interval == 0 or steps_done == last_step)


def announce_sandbox(sandbox: str, needed: bool) -> None:
    """Say once what separates a model's programs from this machine, and what is still open to them.

    Raises UserError if the setting is unknown, or what it requires is not installed.
    """
    if sandbox not in ("auto", "required"):
        raise UserError(f"sandbox={sandbox!r}: 'auto' or 'required'")
    if not needed:
        return
    try:
        print0(f"programs run apart from this machine by: {describe_isolation(sandbox)}")
    except RuntimeError as error:
        raise UserError(
            f"{error}: install bubblewrap (Debian: apt install bubblewrap), or --sandbox=auto"
        ) from None


# ----------------------------------------------------------------------------------------------
# the files of a run


def git_commit() -> str | None:
    """The commit of this repository, or None."""
    folder = Path(__file__).parent
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder, check=False
    )
    return git.stdout.strip() or None


def make_run_folder(out_dir: str, *folders: str) -> None:
    """Make a run's folder.

    folders: the names of those that the run will write there.
    Raises UserError if something else has one of these names, or if the path is one that
    safetensors does not take: the run would notice when it saves.
    """
    try:
        out_dir.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"out_dir={out_dir!r}: no model can be written to a path that is not UTF-8"
        ) from None
    os.makedirs(out_dir, exist_ok=True)
    for name in folders:
        path = os.path.join(out_dir, name)
        if os.path.exists(path) and not os.path.isdir(path):
            raise UserError(
                f"{path} is a file, and this run is to write a folder there: "
                "move it, or choose another --out_dir"
            )


def write_run_config(out_dir: str, settings: dict) -> None:
    """Write config.json: all settings, versions, command, git commit.

    Prints what differs from the file that is already there.
    """
    os.makedirs(out_dir, exist_ok=True)
    file = Path(out_dir, "config.json")
    about = dict(
        settings=settings,
        command=sys.argv,
        commit=git_commit(),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        python=sys.version.split()[0],
    )
    for name in ("torch", "transformers", "datasets", "vllm", "flash_attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[name] = importlib.metadata.version(name)

    for name, value in earlier_settings(file).items():
        now = settings.get(name)
        if json.dumps(value) != json.dumps(now):
            print0(f"note: {out_dir} was started with {name}={value!r}, now it is {now!r}")

    # A path may have bytes that are no UTF-8: they become escapes that JSON knows.
    text = json.dumps(about, indent=1, ensure_ascii=False)
    file.write_text(text, "utf-8", "backslashreplace")


def earlier_settings(file: Path) -> dict:
    """The settings in a run's config.json; {} if it is missing, or written by something else."""
    try:
        about = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    settings = about.get("settings") if isinstance(about, dict) else None
    return settings if isinstance(settings, dict) else {}


def to_disk(file) -> None:
    """Bring to the disk what was written to an open file.

    Of the rows of a step this is done before its checkpoint: if the power fails, there is none that
    has rows missing.
    """
    file.flush()
    os.fsync(file.fileno())


def keep_lines(path: str, before: int, since: int = -1) -> None:
    """Drop the rows of a .jsonl file whose `step` is `before` or later, or earlier than `since`.

    A resumed run makes the former again. A last line that a full disk cut short is dropped as well,
    and lines that are no rows with a step, such as what a crash of the machine leaves: they are
    named.
    """
    if not os.path.exists(path):
        return
    lines = Path(path).read_text("utf-8-sig", "ignore").split("\n")[:-1]
    kept = []
    damaged = []
    for number, line in enumerate(lines, 1):
        try:
            is_kept = since <= json.loads(line)["step"] < before
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(str(number))
            continue
        if is_kept:
            kept.append(line + "\n")
    if damaged:
        print0(f"note: {path}: lines that are no rows are dropped: {', '.join(damaged)[:100]}")
    Path(path + ".tmp").write_text("".join(kept), "utf-8")
    os.replace(path + ".tmp", path)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use: of this process's GPU, or else of the host. GB are 2^30.

    Of a GPU it is what the driver counts at the time of the call, where torch's allocator still has
    all that the passes needed since the engine went to sleep. So ask before the engine wakes up.
    (Torch's own count would include what a sleeping vLLM has given back.)
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
