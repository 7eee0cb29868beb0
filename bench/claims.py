"""
The papers' claims about PRIME, tried again on the built-in world, each with several seeds.

    bash runs/claims.sh               # 5 seeds
    bash runs/claims.sh --quick       # 3 seeds, the main claims only

Every seed has its own world, base model and fine-tuned model, from which all runs of this seed
start. One base model serves two tasks: sums of three digits, of which it gets two fifths right, and
sums of six, of which it gets an eighth right. Its mistakes are some 35 wrong digit sums, which have
to be unlearned one by one (`--habits=facts`).

Interrupted, the same command goes on. Written to --out: claims.md, claims.json, claims.png, and a
folder per seed with all runs. --report-only makes the report of the runs that there are.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from claims_report import Claim, TableClaim, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.run import git_commit  # noqa: E402

# Seed 1 was used to choose the settings below, so it is none of these.
SEEDS = [11, 12, 13, 14, 15]

# --------------------------------------------------------------------------------------------------
# what is run

# Changes of config/toy_prime.py that all runs share: 128 rows per step, 4 updates.
COMMON = [
    "--device=cpu",
    "--prompts_per_step=32",
    "--samples_per_prompt=4",
    "--batch_rows=32",
    "--prm_batch_rows=32",
    "--eval_problems=100",
    "--eval_samples=4",
    "--eval_interval=2",
    "--save_interval=10",
    "--keep_checkpoints=1",
    "--samples_logged=4",
    "--grade_workers=1",
]
PRIME = ["--process_coef=0.3", "--beta=0.3", "--prm_learning_rate=5e-4"]
KNOWN = ["--process_coef=1", "--prm_update=none"]
OUTCOMES = ["--process_coef=0", "--prm_update=none"]
VALUES = ["--value_learning_rate=1e-3"]
TWO = ["--samples_per_prompt=2", "--prompts_per_step=64"]
EIGHT = ["--samples_per_prompt=8", "--prompts_per_step=16"]


@dataclass
class Arm:
    """A run of prime.py that is compared with others.

    settings  added to COMMON; {seed} is the seed's folder
    digits    3 or 6, of the sums
    steps     of training
    start     the policy's start, a folder of the seed's
    fork      the name of a patch in forks/ that changes prime.py first
    """

    settings: list[str]
    digits: int = 3
    steps: int = 30
    start: str = "sft/model"
    fork: str | None = None


ARMS = {
    "outcomes": Arm(OUTCOMES),
    "prime": Arm(PRIME),
    "steps_known": Arm(KNOWN, fork="known_steps"),
    "long_outcomes": Arm(OUTCOMES, digits=6, steps=40),
    "long_prime": Arm(PRIME, digits=6, steps=40),
    "long_steps_known": Arm(KNOWN, digits=6, steps=40, fork="known_steps"),
    "long_outcomes_2": Arm([*OUTCOMES, *TWO], digits=6, steps=40),
    "long_prime_2": Arm([*PRIME, *TWO], digits=6, steps=40),
    "outcomes_2": Arm([*OUTCOMES, *TWO], steps=20),
    "prime_2": Arm([*PRIME, *TWO], steps=20),
    "outcomes_8": Arm([*OUTCOMES, *EIGHT]),
    "prime_8": Arm([*PRIME, *EIGHT]),
    "after": Arm([*PRIME, "--prm_update=after"]),
    "frozen_start": Arm([*PRIME, "--prm_update=none"]),
    "frozen_offline": Arm([*PRIME, "--prm_update=none", "--prm_model={seed}/prm/prm"]),
    "online_offline": Arm([*PRIME, "--prm_model={seed}/prm/prm"]),
    "ref_policy": Arm([*PRIME, "--ref_type=policy"]),
    "prm_base": Arm([*PRIME, "--prm_model={seed}/base/model"]),
    "no_filter": Arm([*PRIME, "--filter_low=0", "--filter_high=1"], steps=64),
    "reinforce": Arm([*OUTCOMES, "--estimator=reinforce", "--whiten=False"]),
    "reinforce_prime": Arm([*PRIME, "--estimator=reinforce", "--whiten=False"]),
    "grpo": Arm([*OUTCOMES, "--estimator=grpo", "--whiten=False"]),
    "grpo_prime": Arm([*PRIME, "--estimator=grpo", "--whiten=False"]),
    "ppo": Arm([*OUTCOMES, *VALUES], fork="value_head"),
    "ppo_prime": Arm([*PRIME, *VALUES], fork="value_head"),
    "from_base": Arm(PRIME, start="base/model"),
    "from_better": Arm(PRIME, start="better/model"),
}
# More than the longest right answer has.
ANSWER_TOKENS = {3: 80, 6: 100}
QUICK = ["outcomes", "prime", "after", "frozen_start"]

PAPER = "PRIME (arXiv 2502.01456)"
CLAIMS = [
    Claim(
        "Process rewards, at equal samples",
        f"{PAPER}, section 4: what RLOO with outcomes alone ends with is reached after 0.4 of the "
        "samples (2.5 times as efficient), and 6.9 % more reward at the end.",
        [("prime", "outcomes"), ("steps_known", "outcomes")],
    ),
    Claim(
        "Process rewards, at equal compute",
        f"{PAPER}, section 4: PRIME's steps take 24 % longer.",
        [("prime", "outcomes"), ("steps_known", "outcomes")],
        "seconds",
    ),
    Claim(
        "Longer chains, rarer success",
        "no published number; six digits in place of three.",
        [("long_prime", "long_outcomes"), ("long_steps_known", "long_outcomes")],
    ),
    Claim(
        "Longer chains, two answers per prompt",
        "no published number.",
        [("long_prime_2", "long_outcomes_2")],
    ),
    Claim("Two answers per prompt", "no published number.", [("prime_2", "outcomes_2")]),
    Claim(
        "Eight answers per prompt",
        f"{PAPER}: 16 answers in place of 4 give 4.4 % more.",
        [("prime_8", "outcomes_8"), ("prime_8", "prime"), ("prime", "prime_2")],
    ),
    Claim(
        "A PRM that learns online",
        f"{PAPER}, section on online updates: far better than a frozen PRM, whose accuracy decays. "
        "A PRM that is frozen as the SFT model gives no rewards: it is its own reference.",
        [("prime", "frozen_start"), ("prime", "frozen_offline")],
    ),
    Claim(
        "PRM trained before or after it scores",
        "PRIME's code scores first (`after`), verl's recipe trains first (`before`, as `prime` "
        "here); neither reports a comparison.",
        [("prime", "after")],
    ),
    Claim(
        "The reference of the log-ratio",
        f"{PAPER}, section on the reference: the SFT model and the running policy do about "
        "equally well.",
        [("prime", "ref_policy")],
    ),
    Claim(
        "The PRM's start",
        f"{PAPER}: the SFT model is a better start than a PRM trained beforehand on 500,000 "
        "more answers; the base model will do as well. Here: 6,000 answers beforehand.",
        [("prime", "online_offline"), ("prime", "prm_base")],
    ),
    Claim(
        "The prompt filter",
        f"{PAPER}, section 3.2: prompts whose mean outcome is between 0.2 and 0.8 only; "
        "less variance of the reward.",
        [("prime", "no_filter")],
    ),
    Claim(
        "RLOO and other estimators, outcomes alone",
        f"{PAPER}, 240 steps: RLOO 36.9, REINFORCE 36.0, GRPO 36.1, PPO with a value head 35.8.",
        [("outcomes", "reinforce"), ("outcomes", "grpo"), ("outcomes", "ppo")],
    ),
    Claim(
        "Process rewards with REINFORCE",
        f"{PAPER}, 240 steps: 36.0 without, 37.8 with them.",
        [("reinforce_prime", "reinforce")],
    ),
    Claim(
        "Process rewards with GRPO",
        f"{PAPER}, 240 steps: 36.1 without, 37.8 with them.",
        [("grpo_prime", "grpo")],
    ),
    Claim(
        "Process rewards with PPO and a value model",
        f"{PAPER}, 240 steps: 35.8 without, 39.4 with them.",
        [("ppo_prime", "ppo")],
    ),
    Claim(
        "A better start needs fewer steps",
        "INTELLECT-MATH's card: 48 steps of PRIME from its SFT model against 592 from Eurus-2's, "
        "less than a tenth, for the same score.",
        [("prime", "from_base"), ("from_better", "prime")],
    ),
]
TABLE_CLAIMS = [
    TableClaim(
        "A tool beats prose",
        "NuminaMath-7B on MATH, greedy: 55.8 after its first stage, chain of thought; 68.1 after "
        "its second, with the tool. Here: sums of five digits, greedy; prose is the base model, "
        "tool the same after fine-tuning on programs.",
        {"prose": ("scores_prose", "greedy"), "tool": ("scores_tool", "greedy")},
        ("tool", "prose"),
    ),
    TableClaim(
        "An implicit PRM ranks answers",
        "arXiv 2412.01981: best of n by a PRM trained with cross-entropy, 48.4 on average. "
        "Here: eight answers of the fine-tuned model to held-out sums of three digits, and the PRM "
        "that was trained beforehand on other problems. The control ranks by the fine-tuned model "
        "against the base model.",
        {
            "avg@8": ("scores_ranked", "sampled"),
            "maj@8": ("scores_ranked", "maj@8"),
            "bon@8, mean": ("scores_ranked", "bon@8"),
            "bon@8, minimum": ("scores_ranked", "bon_min@8"),
            "bon@8 by a control": ("scores_control", "bon@8"),
            "pass@8": ("scores_ranked", "pass@8"),
        },
        ("bon@8, mean", "bon@8 by a control"),
    ),
]


@dataclass
class Task:
    """Commands of a seed, one after the other: (arguments of python, file that says it is done)."""

    name: str
    commands: list[tuple[list[str], Path]]
    root: Path = ROOT

    @property
    def is_done(self) -> bool:
        return all(done.exists() for _, done in self.commands)

    def run(self) -> float:
        """Run what is not done; returns seconds. Raises CalledProcessError if a command fails."""
        began = time.monotonic()
        env = os.environ | dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        for arguments, done in self.commands:
            if done.exists():
                continue
            done.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{done.parent}.log", "a") as log:
                command = [sys.executable, *arguments]
                subprocess.run(command, cwd=self.root, env=env, stdout=log, stderr=log, check=True)
        return time.monotonic() - began


def prepare(folder: Path, seed: int) -> Task:
    """World, base model, fine-tuned models and offline PRM of a seed."""
    run = ["--device=cpu", f"--seed={seed}"]
    world = ["data/arithmetic/prepare.py", f"--seed={seed}", "--habits=facts", "--rl_problems=4000"]
    few = [*world, "--web_solutions=10", "--train_problems=3000"]
    commands = []

    def add(done, *arguments):
        commands.append((list(arguments), folder / done))

    for name, least, more in (("mixed", 3, world), ("3", 3, few), ("6", 6, few)):
        most = 6 if name == "mixed" else least
        out = folder / f"world_{name}"
        digits = [f"--min_digits={least}", f"--max_digits={most}", f"--out_dir={out}"]
        add(f"world_{name}/init/model.safetensors", *more, *digits)

    mixed = folder / "world_mixed"
    add(
        "base/model/model.safetensors",
        "sft.py",
        "config/toy_base.py",
        *run,
        f"--data={mixed}/web.jsonl",
        f"--val_data={mixed}/web_val.jsonl",
        f"--model={mixed}/init",
        f"--out_dir={folder}/base",
    )
    for name, problems in (("sft", mixed), ("better", folder / "world_3")):
        answers = folder / f"answers_{name}"
        add(
            f"answers_{name}/sft.jsonl",
            "generate.py",
            "config/toy_generate.py",
            *run,
            f"--data={problems}/train.jsonl",
            f"--model={folder}/base/model",
            f"--out_dir={answers}",
        )
        add(
            f"{name}/model/model.safetensors",
            "sft.py",
            "config/toy_sft.py",
            *run,
            f"--data={answers}/sft.jsonl",
            f"--model={folder}/base/model",
            f"--out_dir={folder}/{name}",
        )
    # A PRM beforehand: from four answers of the fine-tuned model to each of 1,500 problems.
    add(
        "answers_prm/sft.jsonl",
        "generate.py",
        "config/toy_generate.py",
        *run,
        f"--data={folder}/world_3/rl.jsonl",
        "--max_problems=1500",
        "--samples_per_problem=4",
        f"--model={folder}/sft/model",
        f"--out_dir={folder}/answers_prm",
    )
    add(
        "prm/prm/prm.json",
        "prime.py",
        "config/toy_prime.py",
        *COMMON,
        *PRIME,
        f"--seed={seed}",
        f"--rollouts={folder}/answers_prm/samples.jsonl",
        "--max_steps=100",
        f"--model={folder}/sft/model",
        f"--out_dir={folder}/prm",
    )
    return Task(f"seed {seed}: models", commands)


def use_tool(folder: Path, seed: int) -> Task:
    """The base model learns to add five digits by programs; it without, and that with the tool."""
    mixed = folder / "world_mixed"
    tuned = [
        "sft.py",
        "config/toy_tir_sft.py",
        f"--seed={seed}",
        f"--data={mixed}/tools.jsonl",
        f"--model={folder}/base/model",
        f"--out_dir={folder}/tool",
    ]
    mixed_large = f"{mixed}/large.jsonl"
    without = score(folder, "prose", "base/model", mixed_large, "--max_tokens=160")
    with_tool = score(folder, "tool", "tool/model", mixed_large, "--max_tokens=160", "--tir=True")
    commands = [(tuned, folder / "tool/model/model.safetensors"), without, with_tool]
    return Task(f"seed {seed}: tool", commands)


def use_prm(folder: Path, seed: int) -> Task:
    """The PRM from beforehand ranks answers to held-out problems; and as a control, no PRM.

    The control is the fine-tuned model against the base model: no outcome has taught it anything.
    """
    test = f"{folder}/world_3/test.jsonl"
    prm = [f"--prm={folder}/prm/prm", "--samples=8"]
    control = [f"--prm={folder}/sft/model", f"--prm_ref={folder}/base/model", "--samples=8"]
    ranked = [
        score(folder, "ranked", "sft/model", test, *prm),
        score(folder, "control", "sft/model", test, *control),
    ]
    return Task(f"seed {seed}: ranking", ranked)


def score(folder: Path, name: str, model: str, problems: str, *settings: str):
    """A command of evaluate.py and the file that says it is done."""
    command = [
        "evaluate.py",
        "config/toy_evaluate.py",
        f'--models=["{folder}/{model}"]',
        f'--benchmarks=["{problems}"]',
        f"--out_dir={folder}/scores_{name}",
        *settings,
    ]
    return command, folder / f"scores_{name}" / "results.json"


def train(folder: Path, seed: int, name: str, forks: dict[str, Path]) -> Task:
    """A run of prime.py."""
    arm = ARMS[name]
    world = folder / f"world_{arm.digits}"
    settings = [setting.format(seed=folder) for setting in arm.settings]
    arguments = [
        "prime.py",
        "config/toy_prime.py",
        *COMMON,
        f"--seed={seed}",
        f"--data={world}/rl.jsonl",
        f"--eval_data={world}/test.jsonl",
        f"--model={folder}/{arm.start}",
        f"--out_dir={folder}/{name}",
        f"--max_steps={arm.steps}",
        f"--max_tokens={ANSWER_TOKENS[arm.digits]}",
        *settings,
    ]
    done = folder / name / "policy" / "model.safetensors"
    return Task(f"seed {seed}: {name}", [(arguments, done)], forks.get(arm.fork, ROOT))


def apply_fork(folder: Path, name: str) -> Path:
    """A copy of the scripts, changed by forks/<name>.patch."""
    copy = folder / "forks" / name
    if copy.exists():
        return copy
    unfinished = copy.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, unfinished)
    for part in ("lib", "config"):
        shutil.copytree(ROOT / part, unfinished / part)
    # Else git takes the copy for a part of this repository, and changes nothing.
    env = os.environ | dict(GIT_CEILING_DIRECTORIES=str(unfinished.parent))
    patch = ROOT / "forks" / f"{name}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=unfinished, env=env, check=True)
    unfinished.rename(copy)
    return copy


# --------------------------------------------------------------------------------------------------
# running it


def run_tasks(tasks: list[Task], at_once: int, title: str) -> list[str]:
    """Run tasks, so many at once, in their order; a line per task. Returns names of failed ones."""
    waiting = [task for task in tasks if not task.is_done]
    print(f"{title}: {len(tasks) - len(waiting)} of {len(tasks)} are done", flush=True)
    began = time.monotonic()
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(task.run): task for task in waiting}
        for number, future in enumerate(as_completed(running), 1):
            task = running[future]
            passed = time.monotonic() - began
            left = passed / number * (len(waiting) - number)
            end = f"{timedelta(seconds=round(passed))}, eta {timedelta(seconds=round(left))}"
            if future.exception() is None:
                print(f"{number}/{len(waiting)} {task.name}: {future.result():.0f} s; {end}")
            else:
                failed.append(task.name)
                print(f"{number}/{len(waiting)} {task.name} FAILED: {future.exception()}; {end}")
            sys.stdout.flush()
    return failed


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "claims")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args()


def main():
    options = arguments()
    seeds = SEEDS[:3] if options.quick else SEEDS
    names = QUICK if options.quick else list(ARMS)
    folders = {seed: options.out.resolve() / f"seed{seed}" for seed in seeds}

    failed = []
    if not options.report_only:
        forks = {}
        for name in names:
            fork = ARMS[name].fork
            if fork and fork not in forks:
                forks[fork] = apply_fork(options.out.resolve(), fork)
        models = [prepare(folder, seed) for seed, folder in folders.items()]
        failed += run_tasks(models, options.at_once, "models")
        # Seed after seed: whoever stops early has whole seeds.
        runs = []
        for seed, folder in folders.items():
            runs += [train(folder, seed, name, forks) for name in names]
            if not options.quick:
                runs += [use_tool(folder, seed), use_prm(folder, seed)]
        failed += run_tasks(runs, options.at_once, "runs")

    numbers = ", ".join(map(str, seeds))
    head = (
        f"# The papers' claims on the built-in world\n\nSeeds {numbers}; commit {git_commit()}.\n"
    )
    write_report(options.out, folders, names, CLAIMS, TABLE_CLAIMS, head)
    if failed:
        sys.exit(f"error: failed, see their .log files: {', '.join(failed)}")


if __name__ == "__main__":
    main()
