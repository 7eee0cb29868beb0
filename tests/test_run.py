"""lib/run.py: devices, processes, signals, limits of settings, the files of a run."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, torchrun, write_jsonl

from configurator import UserError
from lib import run as lib_run

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------
# devices


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count): as if torch saw so many GPUs here, and there were no others."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def pretend(count, capability=(9, 0)):
        monkeypatch.setattr(lib_run, "has_nvidia_gpu", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
        return chosen

    return pretend


def test_auto_is_the_cpu_in_float32_without_a_gpu(gpus):
    gpus(0)
    assert lib_run.pick_device("auto", "auto") == (CPU, torch.float32)
    assert lib_run.pick_device("cpu", "bfloat16") == (CPU, torch.bfloat16)


def test_auto_is_cuda_in_bfloat16_where_there_is_a_gpu(gpus, monkeypatch):
    chosen = gpus(4)
    assert lib_run.pick_device("auto", "auto") == (torch.device("cuda", 0), torch.bfloat16)
    assert lib_run.pick_device("cpu", "auto") == (CPU, torch.float32)

    # Each process of torchrun has a GPU of its own.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert lib_run.pick_device("cuda", "float32") == (torch.device("cuda", 3), torch.float32)
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 3)]


def test_a_gpu_older_than_ampere_computes_in_float32(gpus):
    gpus(1, capability=(7, 5))
    assert lib_run.pick_device("auto", "auto") == (torch.device("cuda", 0), torch.float32)
    with pytest.raises(UserError, match="dtype='bfloat16' needs a GPU of compute capability 8.0"):
        lib_run.pick_device("auto", "bfloat16")


def test_devices_that_there_are_not(gpus):
    gpus(0)
    with pytest.raises(UserError, match="device='cuda', but torch .* sees no GPU here"):
        lib_run.pick_device("cuda", "auto")
    with pytest.raises(UserError, match="device='gpu', dtype='auto'"):
        lib_run.pick_device("gpu", "auto")
    with pytest.raises(UserError, match="dtype='float16'"):
        lib_run.pick_device("cpu", "float16")


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus(gpus, monkeypatch, rank):
    """In every process, whether there is a GPU of its number or not; not on the CPU."""
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^2 processes .* torch sees 1 GPU here") as error:
        lib_run.pick_device("auto", "auto")
    assert "--nproc_per_node 1" in str(error.value)
    assert "--device=cpu" in str(error.value)
    # The first process of each node speaks for it.
    assert error.value.rank_local == (rank == 0)
    assert lib_run.pick_device("cpu", "auto") == (CPU, torch.float32)


def test_a_dry_run_goes_on_without_gpus(gpus, monkeypatch, capsys):
    gpus(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert lib_run.pick_device("auto", "bfloat16", dry_run=True) == (CPU, torch.bfloat16)
    out = capsys.readouterr().out
    assert out.startswith("nothing will run on a GPU: 8 processes")
    with pytest.raises(UserError, match="dtype='float16'"):
        lib_run.pick_device("cpu", "float16", dry_run=True)


def test_a_gpu_that_torch_cannot_use_is_no_reason_for_the_cpu(gpus, monkeypatch):
    """Its driver is too old for torch's CUDA, say: a 7B model must not start on the CPU."""
    gpus(0)
    monkeypatch.setattr(lib_run, "has_nvidia_gpu", lambda: True)
    for device in ("auto", "cuda"):
        with pytest.raises(
            UserError, match="there is an NVIDIA GPU, but torch .*580.*--device=cpu"
        ):
            lib_run.pick_device(device, "auto")
    assert lib_run.pick_device("cpu", "auto") == (CPU, torch.float32)


def test_the_drivers_tool_is_asked(tmp_path, monkeypatch):
    """A machine with nvidia-smi has a GPU if that finds one, unless the user has hidden it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit $NO_GPU\n")
    tool.chmod(0o755)
    monkeypatch.setattr(lib_run.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("NO_GPU", "0")
    monkeypatch.setenv("PATH", "")
    assert not lib_run.has_nvidia_gpu()

    monkeypatch.setenv("PATH", str(tmp_path))
    assert lib_run.has_nvidia_gpu()
    monkeypatch.setenv("NO_GPU", "9")
    assert not lib_run.has_nvidia_gpu()
    monkeypatch.setattr(lib_run.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert lib_run.has_nvidia_gpu()

    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not lib_run.has_nvidia_gpu()


def test_each_process_keeps_its_own_gpus(gpus, monkeypatch):
    gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lib_run.keep_own_gpus(gpus_each=2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    # It is alone with them.
    assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["LOCAL_WORLD_SIZE"] == "1"

    # Of those that the user left visible.
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lib_run.keep_own_gpus(gpus_each=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize("rank", [0, 1])
def test_too_few_gpus(gpus, monkeypatch, rank):
    gpus(3)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^2 processes .* 2 GPUs each, .* sees 3 GPUs") as error:
        lib_run.keep_own_gpus(gpus_each=2)
    assert error.value.rank_local == (rank == 0)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_machine_without_gpus_has_none_to_keep(gpus, monkeypatch, hidden):
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lib_run.keep_own_gpus(gpus_each=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


# ----------------------------------------------------------------------------------------------
# cores


@pytest.fixture
def threads():
    """torch.set_num_threads(), and puts their number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def four_cores(monkeypatch):
    """As if this process had four cores, and nobody had chosen threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr(lib_run, "cores", lambda: 4)


def test_processes_share_the_cores(four_cores, threads, monkeypatch, capsys):
    threads(8)
    lib_run.pick_device("cpu", "auto")
    assert torch.get_num_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lib_run.pick_device("cpu", "auto")
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    lib_run.pick_device("cpu", "auto")
    assert torch.get_num_threads() == 1

    # Never more than torch had, and what the user says holds.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    lib_run.pick_device("cpu", "auto")
    assert torch.get_num_threads() == 1
    threads(8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    lib_run.pick_device("cpu", "auto")
    assert torch.get_num_threads() == 8
    assert capsys.readouterr().out == ""


def test_threads_that_spin_are_told_of(four_cores, threads, monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    threads(2)
    lib_run.pick_device("cpu", "auto")
    out = capsys.readouterr().out
    assert out.startswith("note: 2 threads per process on 4 cores.")
    assert "OMP_WAIT_POLICY=passive" in out
    threads(1)
    lib_run.pick_device("cpu", "auto")
    assert capsys.readouterr().out == ""


def test_cores_of_a_container(monkeypatch):
    """At most those that the process may run on, and what the container may compute."""
    here = len(os.sched_getaffinity(0))
    limits = {"max 100000": here, "50000 100000": 1, "150000 100000": min(2, here), "damaged": here}
    for text, expected in limits.items():
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert lib_run.cores() == expected

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert lib_run.cores() == here


# ----------------------------------------------------------------------------------------------
# processes

TWO_PROCESSES = """
import os
import sys
import time

import torch

from configurator import UserError
from lib.run import all_sum, on_first_rank, print0, setup_distributed, waiting_for

rank, world_size = setup_distributed(torch.device("cpu"), minutes=0.1)
out = open(f"{sys.argv[1]}/{rank}", "w")
print0("from rank", rank)

out.write(f"{world_size} {all_sum(rank + 1, torch.device('cpu'))}\\n")
out.write(f"{on_first_rank(lambda: os.environ['RANK'])}\\n")
try:
    on_first_rank(lambda: {}["no such key"])
except (KeyError, UserError) as error:
    out.write(f"{type(error).__name__} {error}\\n")

try:
    with waiting_for("the test", 0.1):
        if rank == 1:
            time.sleep(10)
        all_sum(1, torch.device("cpu"))
except Exception as error:
    out.write(f"{type(error).__name__} {error}\\n")
out.close()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = torchrun(2, script, tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    assert done.stdout.splitlines() == ["from rank 0"]

    first = (tmp_path / "0").read_text().splitlines()
    second = (tmp_path / "1").read_text().splitlines()
    assert first[:2] == second[:2] == ["2 3.0", "0"]
    assert first[2] == "KeyError 'no such key'"
    assert second[2] == "UserError 'no such key'"
    late = "UserError the test: a process did not come within timeout_minutes=0.1"
    assert first[3] == late


JOINED = """
import os
import sys
import time

from lib.run import join_ranks

rank, world_size, wait = join_ranks(1)
folder = sys.argv[1]
if rank == 1:
    time.sleep(1)
    open(f"{folder}/written", "w").close()
wait("written")
assert os.path.exists(f"{folder}/written")
assert world_size == 2 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
wait("end")
"""


@pytest.mark.slow
def test_ranks_joined_without_a_process_group(tmp_path):
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    torchrun(2, script, tmp_path, env=dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""))


def test_a_single_process_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rank, world_size, wait = lib_run.join_ranks(1)
    assert (rank, world_size) == (0, 1)
    wait("anything")


def test_print0(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    lib_run.print0("one", 2)
    monkeypatch.setenv("RANK", "1")
    lib_run.print0("not this")
    assert capsys.readouterr().out == "one 2\n"


# ----------------------------------------------------------------------------------------------
# signals


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_collected_and_a_ctrl_c_after_one_ends_the_run(handlers):
    """torchrun passes a SIGTERM on to processes that may have had it: that does not end them."""
    received = lib_run.catch_signals()
    assert received == []
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGTERM]


def test_the_first_ctrl_c_is_collected(handlers):
    received = lib_run.catch_signals()
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ----------------------------------------------------------------------------------------------
# settings


def test_limits_of_settings():
    settings = dict(rows=4, steps=None, mode="fast")
    lib_run.check_limits(settings, dict(rows=4, steps=1), mode=("fast", "slow"))
    with pytest.raises(UserError, match="^rows=4: at least 5$"):
        lib_run.check_limits(settings, dict(rows=5))
    with pytest.raises(UserError, match="^mode='fast': one of 'slow', 'none'$"):
        lib_run.check_limits(settings, {}, mode=("slow", "none"))


def test_the_sandbox_is_named_if_it_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(lib_run, "describe_isolation", lambda sandbox: f"a {sandbox} box")
    lib_run.announce_sandbox("auto", needed=True)
    assert capsys.readouterr().out == "programs run apart from this machine by: a auto box\n"
    lib_run.announce_sandbox("required", needed=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="sandbox='off'"):
        lib_run.announce_sandbox("off", needed=False)


def test_a_sandbox_that_is_required_and_not_there(monkeypatch):
    def describe_isolation(sandbox):
        raise RuntimeError("no bwrap")

    monkeypatch.setattr(lib_run, "describe_isolation", describe_isolation)
    with pytest.raises(UserError, match="^no bwrap: install bubblewrap .*apt install bubblewrap"):
        lib_run.announce_sandbox("required", needed=True)


# ----------------------------------------------------------------------------------------------
# the files of a run


def test_config_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["prime.py", "--seed=1"])
    out_dir = tmp_path / "out"
    lib_run.write_run_config(str(out_dir), dict(seed=1, text="é", nothing=None))

    about = json.loads((out_dir / "config.json").read_text("utf-8"))
    assert about["settings"] == dict(seed=1, text="é", nothing=None)
    assert about["command"] == ["prime.py", "--seed=1"]
    assert about["world_size"] == 2
    assert about["torch"] == torch.__version__
    assert about["commit"] == lib_run.git_commit()
    assert capsys.readouterr().out == ""

    # What differs from the run that is there is named, and written.
    lib_run.write_run_config(str(out_dir), dict(seed=2, text="é"))
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"note: {out_dir} was started with seed=1, now it is 2",
    ]
    assert json.loads((out_dir / "config.json").read_text("utf-8"))["settings"]["seed"] == 2


@pytest.mark.parametrize("text", ["", "{", '{"command": []}'])
def test_a_config_that_is_damaged_is_replaced(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    lib_run.write_run_config(str(tmp_path), dict(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["settings"] == dict(seed=1)
    assert capsys.readouterr().out == ""


def test_rows_that_a_resume_makes_again_are_dropped(tmp_path):
    path = write_jsonl(tmp_path / "metrics.jsonl", [dict(step=step) for step in range(5)])
    lib_run.keep_lines(str(path), before=3)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]

    # A file that is not there stays so.
    lib_run.keep_lines(str(tmp_path / "other.jsonl"), before=3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_a_full_disk_cut_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 6, "text": "é"}\n'
    path.write_bytes((good + '{"step": 7, "text": "é').encode()[:-1])
    lib_run.keep_lines(str(path), before=8)
    assert path.read_text("utf-8") == good


@pytest.mark.parametrize(
    "line",
    ["", "\0\0", "[1]", "7", '{"a": 1}', '{"step": "a"}', '{"step": null}', '{"st', 10**5 * "["],
)
def test_a_damaged_line_costs_itself_only(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 0}\n{"step": 1}\n'
    path.write_text(f'\ufeff{line}\n{good}{line}\n{{"step": 2}}\n', "utf-8")
    lib_run.keep_lines(str(path), before=2)
    assert path.read_text("utf-8") == good
    assert "metrics.jsonl: lines that are no rows are dropped: 1, 4" in capsys.readouterr().out


def test_a_file_where_a_run_writes_a_folder(tmp_path):
    folder = tmp_path / "run"
    lib_run.make_run_folder(str(folder), "checkpoints", "model")
    (folder / "checkpoints").mkdir()
    lib_run.make_run_folder(str(folder), "checkpoints", "model")
    (folder / "model").write_text("x")
    with pytest.raises(UserError, match="run/model is a file.*move it"):
        lib_run.make_run_folder(str(folder), "checkpoints", "model")
    assert (folder / "model").read_text() == "x"


def test_peak_memory_of_the_host():
    """Some 200 MB to several GB, after torch has been imported."""
    assert 0.05 < lib_run.peak_memory_gb(CPU) < 100
