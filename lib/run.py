"""What every run needs: devices, processes, signals, limits of settings, files of its folder."""

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import UserError
from lib.sandbox import isolation


def print0(*words) -> None:
    """Print on rank 0 only, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


# ----------------------------------------------------------------------------------------------
# devices and processes


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The torch device and dtype that two settings name.

    "auto" is cuda and bfloat16 where there is a GPU, else cpu and float32.
    Raises UserError for another name, and for cuda without a GPU.
    """
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(
            f"device={device!r}, dtype={dtype!r}: "
            "'auto', 'cpu' or 'cuda'; 'auto', 'bfloat16' or 'float32'"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device='cuda', but torch sees no GPU here: "
            "--device=cpu, or install a CUDA build of torch"
        )

    cuda = device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    if not cuda:
        return torch.device("cpu"), getattr(torch, dtype)

    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(gpu)
    return gpu, getattr(torch, dtype)


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


@contextlib.contextmanager
def waiting_for(phase, minutes: float):
    """Name the phase in which another process did not arrive in time.

    phase: a text, or an object that becomes one when it is asked, such as a Stopwatch.
    Raises UserError for a collective of gloo that timed out. (NCCL ends the process by itself.)
    """
    try:
        yield
    except RuntimeError as error:
        # "Timed out" or "timed out", depending on the collective.
        if dist.get_world_size() == 1 or "imed out" not in str(error):
            raise
        message = f"{phase}: a process did not come within timeout_minutes={minutes}"
        raise UserError(message, rank_local=True) from error


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
    end of a vLLM engine would end it. Each process keeps `gpus_each` GPUs for itself.
    Raises UserError if there are too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda word: None

    store, rank, world_size = next(dist.rendezvous("env://"))
    # Otherwise vLLM would look for its own process group in torchrun's store.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    keep_own_gpus(rank, gpus_each)

    def wait(word):
        store.set(f"{word} {rank}", "here")
        everybody = [f"{word} {other}" for other in range(world_size)]
        store.wait(everybody, timedelta(days=7))

    return rank, world_size, wait


def keep_own_gpus(rank: int, gpus_each: int) -> None:
    """Show this process only its own GPUs, by CUDA_VISIBLE_DEVICES. Raises UserError if too few."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    first = int(os.environ["LOCAL_RANK"]) * gpus_each
    own = gpus[first : first + gpus_each]

    if gpus and len(own) < gpus_each:
        raise UserError(
            f"process {rank} finds no {gpus_each} of the GPUs {','.join(gpus)}: "
            "start fewer processes, or set a smaller tensor_parallel",
            rank_local=True,
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    os.environ["LOCAL_RANK"] = "0"


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
    """Say once what separates a model's programs from this machine, if there will be any.

    Raises UserError if the setting is unknown, or what it requires is not installed.
    """
    if sandbox not in ("auto", "required"):
        raise UserError(f"sandbox={sandbox!r}: 'auto' or 'required'")
    if not needed:
        return
    try:
        print0(f"programs run apart from this machine by: {isolation(sandbox)}")
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

    # The file of an earlier run may be missing, or written by something else.
    earlier = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        earlier = json.loads(file.read_text("utf-8"))["settings"]
    for name, value in earlier.items():
        now = settings.get(name)
        if json.dumps(value) != json.dumps(now):
            print0(f"note: {out_dir} was started with {name}={value!r}, now it is {now!r}")

    file.write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")


def keep_lines(path: str, before: int) -> None:
    """Drop the rows of a .jsonl file whose `step` is `before` or later.

    A resumed run makes them again. A last line that a full disk cut short is dropped as well.
    """
    if not os.path.exists(path):
        return
    lines = Path(path).read_text("utf-8", "ignore").split("\n")[:-1]
    kept = [line + "\n" for line in lines if json.loads(line)["step"] < before]
    Path(path + ".tmp").write_text("".join(kept), "utf-8")
    os.replace(path + ".tmp", path)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held: of its GPU, or else of the host. GB are 2^30."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
