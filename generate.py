"""
Sample a teacher, grade the answers, keep the correct ones: the data set of supervised fine-tuning.

    python generate.py                                             # INTELLECT-MATH: QwQ-32B-Preview on NuminaMath, all GPUs
    python generate.py config/toy_generate.py                      # a laptop: the built-in world

Every answer is one row of `samples.jsonl`, written when it is finished. Started again, the script goes on where it was.
The rows that are right and not too long become `sft.jsonl` (`messages` rows), which sft.py reads.
What is left out on purpose: batch files, several nodes, an HTTP server.
"""
import contextlib, gzip, hashlib, importlib.util, itertools, json, os, time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

import torch

import configurator
from configurator import UserError
from tir import announce_sandbox, sample

# --- problems
data = 'PrimeIntellect/NuminaMath-groundtruth'  # hub id, or a .jsonl / .json / .parquet file
data_config = None                  # the hub data set's configuration
split = 'train'                     # the hub data set's split
problem_column = None               # None: prompt (messages), problem, question or instruction, whichever is there
answer_column = None                # None: ground_truth, reward_model, answer, final_answer or solution
max_problems = None                 # only the first so many
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
sft_system_prompt = (               # published: what the student is told
    'Solve the following math problem efficiently and clearly. Think carefully and step by step about your response and reason '
    'before providing a final response. Conclude your response with: \n\nTherefore, the final answer is: $\\boxed{answer}$. '
    'I hope it is correct.\n\nWhere [answer] is just the final number or expression that solves the problem.')
system_prompt = (                   # published: the teacher hears of multiple choice, too
    sft_system_prompt + ' If it is a multiple choice question, [answer] is the letter of your choice.')
user_suffix = ''                    # appended to every problem
# --- teacher
model = 'Qwen/QwQ-32B-Preview'      # hub id or folder
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel = None              # GPUs a model is spread over; None: all of this machine (vllm)
gpu_memory = 0.9                    # share of each card for the engine (vllm)
# --- sampling
samples_per_problem = 2             # published: 2 a question
temperature = 0.9                   # published
top_p = 1.0                         # published: the engine's default
max_prompt_tokens = 2048            # longer prompts are skipped and counted
max_tokens = 8192                   # published: new tokens a sample
seed = 0                            # sample k of a problem has a seed of its own, made of this, the problem's id and k
tir = False                         # the answer may call Python, as NuminaMath-7B-TIR's do: tir.py
tir_rounds = 4                      # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0                   # seconds a program (Numina: 5)
sandbox = 'auto'                    # of programs: 'auto' (the best there is, said at start) or 'required' (bubblewrap)
tir_numina = False                  # the very rules of Numina's notebook, see tir.py
# --- grading and output
grade_workers = None                # processes; None: one a core
grade_timeout = 5.0                 # seconds an answer
out_dir = 'out/generate'            # samples.jsonl and sft.jsonl
sft_max_tokens = 4500               # longer answers stay out of sft.jsonl (published: unknown; the script's 512 drops most)


def read_rows(source, split="train", config=None, max_bad_share=0.01):
    """List of (where, row) of a local .jsonl[.gz], .json or .parquet file or a data set of the Hugging Face hub.
    `where` names the row for messages ("file.jsonl line 7"). Rows that are no JSON object are reported and skipped.
    Raises UserError: no such file, nothing in it, or more than max_bad_share of the rows malformed."""
    name, rows = os.fspath(source), []
    local = name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet"))
    if local and not os.path.exists(name):
        raise UserError(f"no such file: {name}")
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8", errors="replace") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        rows.append((f"{name} line {number}", None))
                        with contextlib.suppress(ValueError):
                            rows[-1] = f"{name} line {number}", json.loads(line)
        else:
            from datasets import load_dataset
            if name.endswith(".json"):          # not by `datasets`, which makes dates of strings like 2020-01-01
                table = json.loads(Path(name).read_text("utf-8"))
            else:
                known = dict(data_files=name, split="train") if local else dict(name=config, split=split)
                table = load_dataset("parquet" if local else name, **known)
            rows = [(f"{name} row {number}", row) for number, row in enumerate(table)]
    except Exception as e:                      # `datasets` raises a dozen kinds: not found, no network, no such split
        reason = str(e).partition("\n")[0][:200]
        raise UserError(f"cannot load the data set {name!r} (split {split!r}): {reason}") from None
    if not rows:
        raise UserError(f"{name} has no rows")
    report_bad([where for where, row in rows if not isinstance(row, dict)], len(rows), max_bad_share, "not a JSON object")
    return [(where, row) for where, row in rows if isinstance(row, dict)]


def report_bad(bad, total, max_share, what):
    """Print how many rows (their places in `bad`) are skipped. UserError: more than max_share of the total, or all."""
    line = f"{len(bad)} of {total} rows skipped ({what}): {', '.join(bad[:4])}"
    if len(bad) > max_share * total or len(bad) == total:
        raise UserError(f"{line}; more than max_bad_share={max_share} is not accepted: mend the file")
    if bad:
        print(line, flush=True)


def load_problems(source, split="train", config=None, problem_column=None, answer_column=None, system_prompt=None,
                  user_suffix="", max_problems=None, max_bad_share=0.01, rows=None, code_suffix=None):
    """List of problems: dicts with id, problem (the user's text), messages, ability ("math" | "code") and ground_truth. Knows
    the columns of NuminaMath (problem; ground_truth or a solution that ends in a box), GSM8K (answer after "####") and
    Eurus-2-RL-Data (prompt messages, ability, reward_model.ground_truth). system_prompt takes the place of the row's; None
    leaves it. code_suffix: the user_suffix of code. rows: read_rows(source), if they are there. UserError: column, file."""
    rows = rows or read_rows(source, split, config, max_bad_share)

    def find(column, names, what):
        if there := [name for name in ([column] if column else names) if name in rows[0][1]]:
            return there[0]
        raise UserError(f"{source} has no column {column or ' or '.join(names)} for the {what}; it has "
                        f"{', '.join(sorted(rows[0][1]))}: set --{what}_column")

    prompt_key = find(problem_column, ["prompt", "problem", "question", "instruction", "Problem"], "problem")
    answer_key = find(answer_column, ["ground_truth", "reward_model", "answer", "final_answer", "solution", "Answer"], "answer")
    problems, bad = [], []
    for index, (where, row) in enumerate(rows[:max_problems]):
        prompt, truth, ability = row.get(prompt_key), row.get(answer_key), row.get("ability", "math")
        truth = truth.get("ground_truth") if isinstance(truth, dict) else truth
        if isinstance(truth, str) and "####" in truth:                  # GSM8K
            truth = truth.rsplit("####", 1)[1].strip().replace(",", "")
        truth = int(truth) if isinstance(truth, float) and truth.is_integer() else truth     # AMC's golds are floats: 36.0
        prompt = [dict(role="user", content=prompt)] if isinstance(prompt, str) and prompt.strip() else prompt
        usable = isinstance(prompt, list) and all(isinstance(m, dict) and m.get("role") and m.get("content") for m in prompt)
        if not usable or not prompt or truth in (None, "", []) or ability not in ("math", "code"):
            bad.append(where)
            continue
        kept = [dict(role=m["role"], content=m["content"]) for m in prompt if system_prompt is None or m["role"] != "system"]
        kept[-1]["content"] += user_suffix if ability == "math" or code_suffix is None else code_suffix
        messages = [dict(role="system", content=system_prompt)] * bool(system_prompt) + kept
        problem_id = next((row[k] for k in ("problem_id", "id", "unique_id", "task_id") if row.get(k) is not None), index)
        problems.append(dict(id=problem_id, problem=prompt[-1]["content"], messages=messages, ability=ability,
                             ground_truth=truth if isinstance(truth, (list, dict)) else str(truth)))
    report_bad(bad, len(bad) + len(problems), max_bad_share, f"no usable {prompt_key!r} or {answer_key!r}")
    return problems


def load_tokenizer(path, chat_template=None):
    """The tokenizer of a folder or hub id; chat_template: a .jinja file that replaces its own.
    Raises UserError: not found, no chat template, no end-of-sequence token."""
    from transformers import AutoTokenizer
    check_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat_template:
        if not os.path.exists(chat_template):
            raise UserError(f"no such file: {chat_template} (--chat_template)")
        tokenizer.chat_template = Path(chat_template).read_text("utf-8")
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template: set --chat_template to a .jinja file")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no end-of-sequence token")
    return tokenizer


def check_model(path):
    """UserError unless path is a hub id or a folder with a config.json; downloads nothing."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path} is not a model folder: it has no config.json")
    if not os.path.isdir(path) and (path.count("/") != 1 or path.startswith((".", "/", "out/", "data/"))):
        raise UserError(f"no such model: {path} is neither a folder nor a hub id")


def encode(tokenizer, text):
    """Token ids of rendered text, with the one begin-of-sequence token that the tokenizer would put there."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    return ids if ids[:1] == begin else begin + ids


def render_prompt(tokenizer, messages):
    """Token ids of the conversation so far, ready for the assistant to go on."""
    return encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def stop_tokens(tokenizer, path):
    """Sorted ids that end an answer: the tokenizer's end token and those of the model's generation_config."""
    from transformers import GenerationConfig
    ids = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):              # the file is optional
        listed = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(listed if isinstance(listed, list) else [listed]) - {None}
    return sorted(ids)


def sample_seed(*parts):
    """A seed made of anything that names a sample, (seed, problem id, k) say: the same whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


# ------------------------------------------------------------ engines
class Sample(NamedTuple):
    tokens: list                    # ids of the answer, the end token included
    logprobs: list                  # of each token, under the temperature it was sampled at
    finish_reason: str              # "stop": ended by itself; "length": cut; "tool": at the stop string; more in tir.py
    mask: list = None               # 1 where the model wrote, 0 where its tool did; None: the model wrote all


def make_engine(kind, path, tokenizer, device, dtype, max_model_len, tensor_parallel=None, gpu_memory=0.9, colocated=False):
    """A vLLM engine or one of transformers. colocated: it shares process and card with a trainer (prime.py), takes new weights
    from an iterator, and sleeps while the trainer works. Raises UserError when vLLM is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "vllm", "hf"):
        raise UserError(f"engine={kind!r}: 'auto', 'vllm' or 'hf'")
    if kind == "vllm" and not installed:
        raise UserError("engine='vllm', but vllm is not installed: pip install -r requirements-gpu.txt, or --engine=hf")
    kind = VLLMEngine if installed and kind != "hf" else HFEngine
    return kind(path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated)


class VLLMEngine:
    """vLLM in this process (colocated) or as vLLM likes it. Requests wait in its queue, so that it is never idle."""
    name = "vllm"

    def __init__(self, path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated):
        cuda, gpus = device.type == "cuda", tensor_parallel or (1 if colocated else max(1, torch.cuda.device_count()))
        options = dict(model=path, dtype=str(dtype).removeprefix("torch."), max_model_len=max_model_len, seed=0,
                       tensor_parallel_size=gpus, logprobs_mode="processed_logprobs", enable_prefix_caching=True,
                       enable_sleep_mode=colocated and cuda,
                       distributed_executor_backend="external_launcher" if colocated else None)
        if colocated or not cuda:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # in this process, so that weights can be handed over
        # on a CPU gpu_memory_utilization means host memory, and compiling takes minutes
        options |= dict(gpu_memory_utilization=gpu_memory) if cuda else dict(kv_cache_memory_bytes=2**28, enforce_eager=True)
        if colocated and not cuda:  # the packed copy of a tied lm_head is not rebuilt when weights are replaced
            import vllm._custom_ops
            vllm._custom_ops._supports_onednn = False
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams
        self.llm, self.params, self.stop = LLM(**options), SamplingParams, stop_tokens(tokenizer, path)
        self.device, self.dtype = device, dtype

    def sample(self, requests, temperature=1.0, top_p=1.0, max_tokens=1024, stop=None, window=4096):
        """requests: iterable of (prompt ids, seed[, max_tokens]). Yields (index in requests, Sample) as they finish.
        stop: a string that ends an answer, too, and stays in it."""
        engine, waiting, running = self.llm.llm_engine, enumerate(requests), 0
        while True:
            for index, (ids, seed, *limit) in itertools.islice(waiting, window - running):
                params = self.params(temperature=temperature, top_p=top_p, max_tokens=min([max_tokens, *limit]), seed=seed,
                                     logprobs=0, flat_logprobs=True, stop_token_ids=self.stop, stop=stop,
                                     include_stop_str_in_output=True, detokenize=stop is not None)
                engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
                running += 1
            if not running:
                return
            for out in engine.step():
                if out.finished:
                    running -= 1
                    a = out.outputs[0]
                    reason = "tool" if stop and a.stop_reason == stop else a.finish_reason
                    yield int(out.request_id), Sample(list(a.token_ids), list(a.logprobs.logprobs), reason)

    def load_weights(self, named):
        """Replace the weights by an iterator of (Hugging Face name, full tensor), one tensor in memory at a time."""
        cast = ((name, tensor.to(self.dtype)) for name, tensor in named)
        if self.device.type == "cuda":
            self.llm.wake_up(tags=["weights"])      # weights first, cache last: both and the trainer's copy do not fit
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=cast))
            self.llm.wake_up(tags=["kv_cache"])
        else:                                       # eager kernels on plain weights: no post-processing to repeat
            self.llm.apply_model(lambda model: model.load_weights(cast) and None)
        self.llm.reset_prefix_cache()               # cached prefixes belong to the old weights

    def sleep(self):
        if self.device.type == "cuda":
            self.llm.sleep(level=2)                 # weights and cache are dropped: new weights come before the next sample

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # also destroys torch's process group: the last thing a script does


class HFEngine:
    """transformers' generate() with random numbers of our own: slower than vLLM, runs everywhere."""
    name = "hf"

    def __init__(self, path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated):
        from transformers import AutoModelForCausalLM, GenerationConfig, logging
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.model.generation_config = GenerationConfig()           # no repetition penalty and the like behind our back
        self.device, self.max_model_len, self.tokenizer = device, max_model_len, tokenizer
        self.stop = stop_tokens(tokenizer, path)

    def sample(self, requests, temperature=1.0, top_p=1.0, max_tokens=1024, stop=None, batch_tokens=2**17, batch_rows=256):
        """As VLLMEngine.sample(), batch by batch."""
        requests = sorted(enumerate(requests), key=lambda r: len(r[1][0]))      # alike lengths share a batch
        rows = max(1, min(batch_rows, batch_tokens // min(self.max_model_len, max_tokens + 1)))
        for start in range(0, len(requests), rows):
            yield from self._sample_batch(requests[start:start + rows], temperature, top_p, max_tokens, stop)

    def _sample_batch(self, requests, temperature, top_p, max_tokens, stop):
        from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
        prompts = [prompt for _, (prompt, *_) in requests]
        limits = [min(*limit, max_tokens, self.max_model_len - len(prompt)) for _, (prompt, _, *limit) in requests]
        P, logprobs = max(map(len, prompts)), []
        ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=self.device)           # [B, P], padded on the left
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        # One uniform number a token, drawn from the row's own seed: a sample does not depend on the batch around it.
        uniform = torch.stack([torch.rand(max(limits), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                               for _, (_, seed, *_) in requests]).to(self.device)                     # [B, T]

        def choose(_, logits):      # [B, V] -> the same with -inf for all tokens but one, the one that generate() will take
            logp = logits.log_softmax(-1)
            cdf, t = logp.double().exp().cumsum(-1), len(logprobs)  # the token whose share of [0, 1] holds the number
            token = torch.searchsorted(cdf, uniform[:, t:t + 1] * cdf[:, -1:], right=True).clamp_(max=logp.shape[-1] - 1)
            token = token if temperature else logp.argmax(-1, keepdim=True)
            logprobs.append(logp.gather(-1, token).squeeze(-1))
            return torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)

        warp = [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)] if temperature else []
        out = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=[*warp, choose], stop_strings=stop,
                                  max_new_tokens=max(limits), eos_token_id=self.stop, pad_token_id=self.stop[0],
                                  tokenizer=self.tokenizer if stop else None)[:, P:].tolist()
        for (number, *_), limit, tokens, values in zip(requests, limits, out, torch.stack(logprobs, 1).tolist()):
            length = next((t for t, token in enumerate(tokens[:limit]) if token in self.stop), limit)
            reason = "stop" if length < min(limit, len(tokens)) else "length"
            if stop and stop in self.tokenizer.decode(tokens[:length]):   # ended by the string: what follows is padding
                reason = "tool"
            length = min(length + (reason == "stop"), len(tokens))
            yield number, Sample(tokens[:length], values[:length], reason)

    def load_weights(self, named):
        """Replace the weights by an iterator of (name, full tensor)."""
        for name, tensor in named:
            self.model.get_parameter(name).data.copy_(tensor)

    sleep = close = lambda self: None               # there is nothing to hand back


def pick_device(device, dtype):
    """(torch.device, torch dtype) of the settings; 'auto' is cuda and bfloat16 where there is a GPU, else cpu and float32.
    Raises UserError for another name, and for cuda without a GPU."""
    for name, value, *known in (("device", device, "auto", "cpu", "cuda"), ("dtype", dtype, "auto", "bfloat16", "float32")):
        if value not in known:
            raise UserError(f"{name}={value!r}: one of {', '.join(known)}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device='cuda', but torch sees no GPU here: --device=cpu, or install a CUDA build of torch")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if cuda else "float32")


def stream_answers(engine, grader, tokenizer, jobs, path, sampling):
    """Sample, grade meanwhile, and append each answer to a .jsonl file as it is finished. jobs: list of (prompt ids, problem,
    row with the sample's seed); the row gets problem_id, ground_truth, response, finish_reason, n_tokens and correct."""
    from tqdm import tqdm
    right, tokens, start, pending = 0, 0, time.time(), deque()
    answers = sample(engine, tokenizer, [(ids, row["seed"]) for ids, _, row in jobs], **sampling)
    with open(path, "a", encoding="utf-8") as out, tqdm(total=len(jobs), unit="answer", smoothing=0.05) as bar:
        for index, answer in itertools.chain(answers, [(None, None)]):      # None: all is sampled, wait for the last verdicts
            if answer is not None:
                _, problem, row = jobs[index]
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                row = row | dict(problem_id=problem["id"], ground_truth=problem["ground_truth"], response=text,
                                 finish_reason=answer.finish_reason, n_tokens=len(answer.tokens))
                pending.append((row, grader.submit(text, problem)))
                tokens += row["n_tokens"]
            while pending and (answer is None or pending[0][1].done()):
                row, outcome = pending.popleft()
                row["correct"] = outcome.result() == 1.0
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                right += row["correct"]
                bar.update()
            out.flush()
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tok/s, {right / max(1, bar.n):.1%} right", refresh=False)


def resume_rows(path, same):
    """The rows that are in a .jsonl file (made if it is not there); a last line that a kill cut short is removed.
    UserError: a row was made with other settings than `same`, {name: value}."""
    with open(path, "ab+") as f:
        f.seek(0)
        lines = f.read().split(b"\n")
        f.truncate(f.tell() - len(lines.pop()))                     # that answer is made again, with the same seed
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if other := {k: row.get(k) for k in same if row.get(k) != same[k]}:
            raise UserError(f"{path} was begun with {other}, now it is {same}: the settings of before, or another --out_dir")
    return rows


def main():
    from grader import Grader
    if min(samples_per_problem, max_tokens, tir_rounds) < 1:
        raise UserError("samples_per_problem, max_tokens and tir_rounds must be at least 1")
    torch_device, torch_dtype = pick_device(device, dtype)
    problems = load_problems(data, split, data_config, problem_column, answer_column, system_prompt, user_suffix,
                             max_problems, max_bad_share)
    tokenizer = load_tokenizer(model)
    announce_sandbox(sandbox, tir or any(p["ability"] == "code" for p in problems))
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, "samples.jsonl")
    sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    sampling |= dict(rounds=tir_rounds, tool_timeout=tir_timeout, numina=tir_numina) if tir else {}
    same = dict(model=model, sampling=sampling)
    done = {(str(row["problem_id"]), row["sample"]) for row in resume_rows(path, same)}
    jobs, skipped = [], 0
    for p in problems:
        missing = [k for k in range(samples_per_problem) if (str(p["id"]), k) not in done]
        ids, asked = render_prompt(tokenizer, p["messages"]) if missing else [], p["messages"][-1]["content"]
        if len(ids) > max_prompt_tokens:
            skipped += 1
        else:
            jobs += [(ids, p, same | dict(sample=k, problem=asked, seed=sample_seed(seed, str(p["id"]), k))) for k in missing]
    print(f"{len(problems)} problems x {samples_per_problem} samples; {len(done)} rows are there, {len(jobs)} to sample; "
          f"{skipped} problems skipped: their prompt is longer than max_prompt_tokens={max_prompt_tokens}")
    if jobs:
        sampler = make_engine(engine, model, tokenizer, torch_device, torch_dtype, max_prompt_tokens + max_tokens,
                              tensor_parallel, gpu_memory)
        print(f"engine: {sampler.name}; first prompt:\n{tokenizer.decode(jobs[0][0])}", flush=True)
        with Grader(workers=grade_workers, timeout=grade_timeout) as grader:
            stream_answers(sampler, grader, tokenizer, jobs, path, sampling)
        sampler.close()
    write_sft_set(path)


def write_sft_set(path):
    """samples.jsonl -> sft.jsonl: answers that are right, ended by themselves and are short enough, as `messages` rows."""
    from grader import extract_answer
    sft_path, count, tokens = os.path.join(os.path.dirname(path), "sft.jsonl"), Counter(), 0
    with open(path, encoding="utf-8") as f, open(sft_path + ".tmp", "w", encoding="utf-8") as out:
        for row in map(json.loads, f):
            tokens += row["n_tokens"]
            fate = "kept" if row["n_tokens"] <= sft_max_tokens else "too long"
            if not row["correct"]:
                fate = "wrong" if extract_answer(row["response"]) else "no box"
            if row["finish_reason"] != "stop":
                fate = "truncated"
            count[fate] += 1
            if fate == "kept":
                talk = [("system", sft_system_prompt), ("user", row["problem"]), ("assistant", row["response"])]
                kept = dict(messages=[dict(role=role, content=text) for role, text in talk if text],
                            ground_truth=row["ground_truth"], id=row["problem_id"])
                out.write(json.dumps(kept, ensure_ascii=False) + "\n")
    os.replace(sft_path + ".tmp", sft_path)
    n = max(1, count.total())
    fates = ", ".join(f"{count[k]} {k} ({count[k] / n:.1%})" for k in ("kept", "wrong", "no box", "truncated", "too long"))
    print(f"{n} answers, {tokens / n:.0f} tokens on average: {fates}; wrote {sft_path}")
    if not count["kept"]:
        raise UserError(f"no answer in {path} is right: {sft_path} is empty; try more samples_per_problem or another model")


if __name__ == "__main__":
    configurator.run(main, globals())
