"""What the tests share: the repository on sys.path, a small world, models, ways to run scripts."""

import importlib
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
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub is a mistake
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs, too, the CPU is tested


@pytest.fixture(scope="session")
def shared():
    """Folder with benchmark files; without the environment variable such tests are skipped."""
    if "PRIME_SHARED" not in os.environ:
        pytest.skip("set PRIME_SHARED to the folder with the reference data")
    folder = pathlib.Path(os.environ["PRIME_SHARED"])
    assert folder.is_dir(), f"PRIME_SHARED={folder} is not a folder"
    return folder


# Hundreds of small tests each, of parts that other tests use as well.
SLOW_FILES = {
    "test_engine.py",
    "test_fuzz.py",
    "test_pretrained.py",
    "test_sandbox.py",
    "test_words.py",
}


def pytest_ignore_collect(collection_path, config):
    """They need not even be imported where only the fast ones run."""
    if config.option.markexpr == "not slow" and collection_path.name in SLOW_FILES:
        return True


def pytest_collection_modifyitems(items):
    """Slow are tests of a model that has to be trained first, in a browser, and in some files."""
    for item in items:
        slow = {"guesser", "caller", "browse"} & set(item.fixturenames)
        if slow or item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


# ----------------------------------------------------------------------------------------------
# running scripts


def run(*command, check=True, env=None, timeout=300, cwd=ROOT):
    """Run a script in a process of its own, with one thread; its output if it fails."""
    environment = os.environ | dict(OMP_NUM_THREADS="1") | (env or {})
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        check=False,
    )
    if check:
        # The first lines of what went wrong say more than what torchrun adds to them.
        output = f"{done.stdout[-3000:]}\n{done.stderr[:3000]}\n...\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{output}"
    return done


def torchrun(processes, *command, **options):
    """The same under torchrun, on so many processes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return run(*start, *command, **options)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_nodes(processes, *command):
    """A script on two "nodes" of this machine, with so many processes each and a rendezvous."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--nproc_per_node={processes}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]
    nodes = []
    for number in (0, 1):
        node = subprocess.Popen(
            [*start, f"--node_rank={number}", *map(str, command)],
            cwd=ROOT,
            env=os.environ | dict(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        nodes.append(node)
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-3000:]


def call(module, *argv):
    """Run a script's main() in this process, then put its settings back.

    argv: settings as on the command line. Saves the seconds that a new process takes to import.
    """
    import torch.distributed as dist

    import configurator

    before = configurator.values(vars(module))
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        configurator.configure(vars(module), list(map(str, argv)))
        return module.main()
    finally:
        vars(module).update(before)
        # A script names itself rank 0 of 1 there, and configurator.run() ends ranks at once.
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def children(pid):
    """Process ids of a process's children."""
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# ----------------------------------------------------------------------------------------------
# data and models


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small built-in world."""
    folder = tmp_path_factory.mktemp("world")
    sizes = dict(
        web_solutions=300,
        web_val_solutions=20,
        train_problems=50,
        rl_problems=50,
        test_problems=50,
        tool_solutions=50,
        large_problems=50,
        code_solutions=50,
        code_rl_problems=50,
        code_test_problems=50,
    )
    settings = [f"--{name}={size}" for name, size in sizes.items()]
    call(importlib.import_module("data.arithmetic.prepare"), f"--out_dir={folder}", *settings)
    return folder


def message(role, content):
    return dict(role=role, content=content)


@pytest.fixture(scope="session")
def guess_data(tmp_path_factory):
    """(SFT rows, problems): the answer to "k?" is a number from 1 to 3 that nobody can know.

    A few words of no use stand before it.
    """
    folder = tmp_path_factory.mktemp("guess")
    rows = []
    problems = []
    for k in range(10, 50):
        problems.append(dict(problem=f"{k}?", ground_truth=str(1 + k % 3), problem_id=k))
        for digit in (1, 2, 3):
            answer = "7" * (k % 4) + f"\\boxed{{{digit}}}"
            rows.append(dict(messages=[message("user", f"{k}?"), message("assistant", answer)]))
    return (
        write_jsonl(folder / "sft.jsonl", rows),
        write_jsonl(folder / "problems.jsonl", problems),
    )


SFT = [
    "--tokenizer=None",
    "--max_length=64",
    "--device=cpu",
    "--val_rows=0",
    "--save_interval=0",
    "--checkpointing=False",
]


@pytest.fixture(scope="session")
def guesser(world, guess_data, tmp_path_factory):
    """A model that answers those problems at random: right one time in three.

    That is what RL needs to start from. Made by sft.py.
    """
    out = tmp_path_factory.mktemp("guesser")
    settings = ["--batch_size=120", "--epochs=40", "--learning_rate=5e-3", "--log_interval=10"]
    files = [f"--data={guess_data[0]}", f"--model={world}/init", f"--out_dir={out}"]
    run("sft.py", *files, *SFT, *settings)
    return out / "model"


@pytest.fixture(scope="session")
def caller(world, tmp_path_factory):
    """A model that answers "k?" with 7k, by a program. Made by sft.py."""
    out = tmp_path_factory.mktemp("caller")
    rows = []
    for k in range(10, 50):
        program = f"```python\nprint({k}*7)\n```\n```output\n{k * 7}\n```\n"
        answer = program + f"\\boxed{{{k * 7}}}"
        rows.append(dict(messages=[message("user", f"{k}?"), message("assistant", answer)]))
    data = write_jsonl(out / "rows.jsonl", rows)
    settings = ["--batch_size=40", "--epochs=120", "--learning_rate=5e-3", "--log_interval=30"]
    files = [f"--data={data}", f"--model={world}/init", f"--out_dir={out}"]
    run("sft.py", *files, *SFT, "--max_length=128", *settings)
    return out / "model"
