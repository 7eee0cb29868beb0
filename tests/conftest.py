"""What the tests share: the repository on sys.path, a small world and models made here, and ways to run the scripts."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # a test that asks the hub is a mistake


@pytest.fixture(scope="session")
def shared():
    """Folder with the reference numbers and benchmark files; without the variable such tests are skipped."""
    if "PRIME_SHARED" not in os.environ:
        pytest.skip("set PRIME_SHARED to the folder with the reference data")
    folder = pathlib.Path(os.environ["PRIME_SHARED"])
    assert folder.is_dir(), f"PRIME_SHARED={folder} is not a folder"
    return folder


def run(*command, check=True, **kwargs):
    """Run a script in a process of its own, one thread each; its output on failure."""
    kwargs.setdefault("timeout", 300)
    env = os.environ | dict(OMP_NUM_THREADS="1") | kwargs.pop("env", {})
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env, **kwargs)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def torchrun(processes, *command, **kwargs):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *command, **kwargs)


def two_nodes(processes, *command):
    """The same script on two "nodes" of this machine, with so many processes each, a rendezvous between them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1",
             f"--master_port={port}"]
    nodes = [subprocess.Popen([*start, f"--node_rank={node}", *map(str, command)], cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for node in (0, 1)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-3000:]


def call(module, *argv):
    """Run a script's main() in this process with settings of the command line, and put its defaults back afterwards."""
    import configurator
    before, handlers = configurator.values(vars(module)), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        configurator.configure(vars(module), list(map(str, argv)))
        return module.main()
    finally:
        vars(module).update(before)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        import torch.distributed as dist
        if dist.is_initialized():
            dist.destroy_process_group()


def children(pid):
    """Process ids of a process's children."""
    return [int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The built-in world, small: its folder."""
    folder = tmp_path_factory.mktemp("world")
    run("data/arithmetic/prepare.py", f"--out_dir={folder}", "--web_solutions=300", "--web_val_solutions=20", "--train_problems=50",
        "--rl_problems=50", "--test_problems=50", "--tool_solutions=50", "--large_problems=50", "--code_solutions=50",
        "--code_rl_problems=50", "--code_test_problems=50")
    return folder


@pytest.fixture(scope="session")
def guess_data(tmp_path_factory):
    """(SFT rows, problems): the answer to "k?" is a number from 1 to 3 that nobody can know, after a few words of no use."""
    folder = tmp_path_factory.mktemp("guess")
    rows = [dict(messages=[dict(role="user", content=f"{k}?"), dict(role="assistant", content="7" * (k % 4) + f"\\boxed{{{d}}}")])
            for k in range(10, 50) for d in (1, 2, 3)]
    problems = [dict(problem=f"{k}?", ground_truth=str(1 + k % 3), problem_id=k) for k in range(10, 50)]
    return write_jsonl(folder / "sft.jsonl", rows), write_jsonl(folder / "problems.jsonl", problems)


SFT = ["--tokenizer=None", "--max_length=64", "--device=cpu", "--val_rows=0", "--save_interval=0", "--checkpointing=False"]


@pytest.fixture(scope="session")
def guesser(world, guess_data, tmp_path_factory):
    """A model that answers those problems at random, right one time in three: what RL needs to start from. Made by sft.py."""
    out = tmp_path_factory.mktemp("guesser")
    run("sft.py", f"--data={guess_data[0]}", f"--model={world}/init", f"--out_dir={out}", *SFT, "--batch_size=120", "--epochs=40",
        "--learning_rate=5e-3", "--log_interval=10")
    return out / "model"


@pytest.fixture(scope="session")
def caller(world, tmp_path_factory):
    """A model that answers "k?" with 7k, by a program. Made by sft.py."""
    out = tmp_path_factory.mktemp("caller")
    rows = [dict(messages=[dict(role="user", content=f"{k}?"), dict(role="assistant", content=(
        f"```python\nprint({k}*7)\n```\n```output\n{k * 7}\n```\n\\boxed{{{k * 7}}}"))]) for k in range(10, 50)]
    run("sft.py", f"--data={write_jsonl(out / 'rows.jsonl', rows)}", f"--model={world}/init", f"--out_dir={out}",
        *[a.replace("=64", "=128") for a in SFT], "--batch_size=40", "--epochs=120", "--learning_rate=5e-3", "--log_interval=30")
    return out / "model"
