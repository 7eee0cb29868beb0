"""forks/: each patch applies to a copy of the scripts, passes the linter, and trains."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl, run

PATCHES = sorted((ROOT / "forks").glob("*.patch"))
NAMES = [path.stem for path in PATCHES]


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(name): a folder with the scripts as that patch changes them."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "lib", folder / "lib")
        # Else git takes the copy for a part of another repository, and changes nothing.
        env = os.environ | dict(GIT_CEILING_DIRECTORIES=str(folder.parent))
        patch = ROOT / "forks" / f"{name}.patch"
        subprocess.run(["git", "apply", str(patch)], cwd=folder, env=env, check=True)
        made[name] = folder
        return folder

    return make


def ask(folder, code):
    """What a few lines of Python print in a folder of scripts."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", NAMES)
def test_fork_says_what_it_is_and_is_listed(name):
    head = (ROOT / "forks" / f"{name}.patch").read_text().partition("diff --git")[0]
    for word in ("What: ", "Source: ", "What to expect: "):
        assert re.search(f"^{word}", head, re.MULTILINE)
    assert f"`{name}.patch`" in (ROOT / "forks" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_fork_is_as_tidy_as_the_scripts(fork, name):
    for command in (["format", "--check"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=fork(name), check=True)


# What each needs besides, and a metric of the run that shows that it is at work.
SETTINGS = {
    "known_steps": (["--prm_update=none"], lambda row: "prm_loss" not in row),
    "value_head": (["--value_learning_rate=1e-3"], lambda row: row["value_loss"] > 0),
    # All ratios but 1 are clipped.
    "clip_higher": (["--clip=0", "--clip_high=0"], lambda row: row["clipfrac"] > 0.2),
    "kl_penalty": (["--kl_coef=0.1"], lambda row: row["kl_ref"] >= 0),
    # Every answer is overlong: no outcome is left whole.
    "length_penalty": (["--overlong=1000"], lambda row: 0 < row["outcome"] < 0.02),
}


@pytest.fixture
def train(guesser, guess_data, fork, tmp_path):
    """train(name, *settings): the metrics of two steps of a fork."""

    def go(name, *settings):
        out = tmp_path / "-".join(settings).replace("--", "")
        run(
            "prime.py",
            f"--data={guess_data[1]}",
            f"--model={guesser}",
            "--engine=hf",
            "--device=cpu",
            "--prompts_per_step=4",
            "--samples_per_prompt=4",
            "--max_prompt_tokens=40",
            "--max_tokens=12",
            "--batch_rows=8",
            "--prm_batch_rows=8",
            "--max_steps=2",
            "--beta=1",
            "--filter_low=0",
            "--filter_high=1",
            "--learning_rate=1e-4",
            "--save_interval=1",
            "--grade_workers=1",
            "--checkpointing=False",
            *settings,
            f"--out_dir={out}",
            cwd=fork(name),
        )
        assert (out / "policy" / "model.safetensors").exists()
        return read_jsonl(out / "metrics.jsonl")

    return go


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fork_trains(name, train):
    settings, at_work = SETTINGS[name]
    rows = train(name, *settings)
    assert [row["step"] for row in rows] == [0, 1]
    assert at_work(rows[-1])


@pytest.mark.slow
def test_kl_penalty_holds_the_policy(train):
    free = train("kl_penalty", "--learning_rate=1e-2", "--kl_coef=0.0")
    held = train("kl_penalty", "--learning_rate=1e-2", "--kl_coef=10.0")
    assert 0 <= held[-1]["kl_ref"] < free[-1]["kl_ref"]


# ----------------------------------------------------------------------------------------------
# formulas


def test_clip_higher_by_hand(fork):
    """Ratios of 1.25 and 0.7, advantages 1 and -1: nothing is clipped above, and 0.8 below."""
    code = """
import torch, prime
new = torch.tensor([[1.25, 0.7]]).log()
mask = torch.ones(1, 2)
loss, _ = prime.ppo_loss(new, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, 0.2, 0.28)
print(f"{loss:.4f}")
"""
    # (-1.25 + 0.8) / 2
    assert ask(fork("clip_higher"), code) == "-0.2250\n"


def test_length_penalty_by_hand(fork):
    code = """
import prime
print([prime.length_factor(n, 100, 20) for n in (0, 80, 85, 90, 100, 130)])
"""
    assert ask(fork("length_penalty"), code) == "[1.0, 1.0, 0.75, 0.5, 0.0, 0.0]\n"


def test_gae_by_hand(fork):
    """Values 0.5 0.2 0.6 and a reward of 1 at the end; the token in between is a tool's."""
    code = """
import torch, prime
rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
values = torch.tensor([[0.5, 0.2, 9.0, 0.6]])
mask = torch.tensor([[True, True, False, True]])
for gae_lambda in (1.0, 0.0, 0.5):
    found = prime.gae(rewards, values, mask, gae_lambda)[0].tolist()
    print(" ".join(f"{value:.3f}" for value in found))
"""
    # lambda 1: 1 - V. lambda 0: -0.3, 0.4, 0.4. lambda 0.5: 0.4, 0.4 + 0.2, -0.3 + 0.3.
    assert ask(fork("value_head"), code).splitlines() == [
        "0.500 0.800 0.000 0.400",
        "-0.300 0.400 0.000 0.400",
        "0.000 0.600 0.000 0.400",
    ]


def test_value_loss_by_hand(fork):
    code = """
import torch, prime
values = torch.tensor([[0.5, 0.25], [0.5, 0.9]])
mask = torch.tensor([[True, True], [True, False]])
print(f"{prime.value_loss(values.log(), mask, torch.tensor([1.0, 0.0])):.4f}")
"""
    # Row 1: (ln 2 + ln 4) / 2 = 1.0397; row 2: ln 2 = 0.6931.
    assert ask(fork("value_head"), code) == "0.8664\n"
