"""
Sample a teacher, grade the answers, keep the correct ones: the data set of supervised fine-tuning.

    python generate.py                                             # INTELLECT-MATH: QwQ-32B-Preview on NuminaMath, all GPUs
    python generate.py config/toy_generate.py                      # a laptop: the built-in world

Every answer is one row of `samples.jsonl`, written when it is finished. Started again, the script goes on where it was.
The rows that are right and not too long become `sft.jsonl` (`messages` rows), which sft.py reads.

The other scripts import from here what samples: load_problems, render_prompt, make_engine, sample_seed.
What is left out on purpose: batch files, several nodes, an HTTP server.
"""
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import time
from collections import Counter, deque
from typing import NamedTuple

import configurator
from configurator import UserError

# --- problems
data = 'PrimeIntellect/NuminaMath-groundtruth'  # hub id, or a .jsonl / .json / .parquet file
data_config = None                  # the hub data set's configuration
split = 'train'                     # the hub data set's split
problem_column = None               # None: prompt (messages), problem, question or instruction, whichever is there
answer_column = None                # None: ground_truth, reward_model, answer, final_answer or solution
max_problems = None                 # only the first so many
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
system_prompt = r"""Solve the following math problem efficiently and clearly. Think carefully and step by step about your response and reason before providing a final response. Conclude your response with: 

Therefore, the final answer is: $\boxed{answer}$. I hope it is correct.

Where [answer] is just the final number or expression that solves the problem. If it is a multiple choice question, [answer] is the letter of your choice."""  # what the teacher is told
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
# --- grading
grade_workers = None                # processes; None: one a core
grade_timeout = 5.0                 # seconds an answer
# --- output
out_dir = 'out/generate'            # samples.jsonl and sft.jsonl
sft_max_tokens = 4500               # longer answers stay out of sft.jsonl; the published limit is not known (512 in the
                                    # script would drop nearly all); sft.py cuts at 5000 tokens with the prompt
sft_system_prompt = r"""Solve the following math problem efficiently and clearly. Think carefully and step by step about your response and reason before providing a final response. Conclude your response with: 

Therefore, the final answer is: $\boxed{answer}$. I hope it is correct.

Where [answer] is just the final number or expression that solves the problem."""  # published: without multiple choice


# ---------------------------------------------------------------------------------------------------------------------
# problems

def read_rows(source, split="train", config=None, max_bad_share=0.01):
    """List of (where, row) of a local .jsonl[.gz], .json or .parquet file or a data set of the Hugging Face hub.

    `where` names the row for messages ("file.jsonl line 7"). A malformed line of a .jsonl file is reported and skipped.
    Raises UserError: no such file, nothing in it, or more than max_bad_share of the lines malformed."""
    name = os.fspath(source)
    local = name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet"))
    if local and not os.path.exists(name):
        raise UserError(f"no such file: {name}")
    rows, bad = [], []
    if name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8", errors="replace") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                (rows if isinstance(row, dict) else bad).append((f"{name} line {number}", row))
    elif name.endswith(".json"):
        with open(name, encoding="utf-8") as f:
            try:
                table = json.load(f)
            except ValueError as e:
                raise UserError(f"{name} is not valid JSON: {e}") from None
        rows = [(f"{name} row {i}", row) for i, row in enumerate(table)]
    else:
        import datasets
        try:
            table = datasets.load_dataset("parquet", data_files=name, split="train") if local else \
                datasets.load_dataset(name, config, split=split)
        except Exception as e:      # the hub library raises a dozen kinds: not found, no network, no such split, ...
            raise UserError(f"cannot load the data set {name!r} (split {split!r}): {str(e).splitlines()[0][:200]}") from None
        rows = [(f"{name} row {i}", row) for i, row in enumerate(table)]
    report_bad([where for where, _ in bad], len(rows) + len(bad), max_bad_share, "is not a JSON object")
    if not rows:
        raise UserError(f"{name} has no rows")
    return rows


def report_bad(bad, total, max_share, what):
    """Print how many rows (their places in `bad`) were skipped; UserError when they are more than max_share of the total."""
    if not bad:
        return
    line = f"{len(bad)} of {total} rows skipped: {bad[0]} {what}" + (f" (also {', '.join(bad[1:4])})" if bad[1:] else "")
    if len(bad) > max_share * total:
        raise UserError(line + f"; more than max_bad_share={max_share} is not accepted: mend the file")
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


def load_problems(source, split="train", config=None, problem_column=None, answer_column=None, system_prompt=None,
                  user_suffix="", max_problems=None, max_bad_share=0.01):
    """List of problems: dicts with id, problem (the user's text), messages, ability ("math" | "code") and ground_truth.

    Understands the columns of NuminaMath (problem; ground_truth or a solution that ends in a box), GSM8K (question;
    answer after "####") and Eurus-2-RL-Data (prompt messages, ability, reward_model.ground_truth). system_prompt is put
    in front, in place of one that is there; None leaves the row's. Raises UserError for a missing column or file."""
    rows = read_rows(source, split, config, max_bad_share)

    def find(column, names, what):
        have = rows[0][1]
        found = next((n for n in ([column] if column else names) if n in have), None)
        if found is None:
            raise UserError(f"{source} has no column {column or ' or '.join(names)} for the {what}; it has "
                            f"{', '.join(sorted(have))}: set --{what}_column")
        return found

    prompt_key = find(problem_column, ["prompt", "problem", "question", "instruction", "Problem"], "problem")
    answer_key = find(answer_column, ["ground_truth", "reward_model", "answer", "final_answer", "solution", "Answer"], "answer")
    problems, bad = [], []
    for index, (where, row) in enumerate(rows[:max_problems]):
        prompt, truth = row.get(prompt_key), row.get(answer_key)
        if isinstance(truth, dict):
            truth = truth.get("ground_truth")
        if isinstance(truth, str) and "####" in truth:                  # GSM8K
            truth = truth.rsplit("####", 1)[1].strip().replace(",", "")
        if isinstance(truth, float) and truth.is_integer():             # AMC's golds are floats: 36.0
            truth = int(truth)
        ability = row.get("ability", "math")
        if isinstance(prompt, str) and prompt.strip():
            prompt = [{"role": "user", "content": prompt}]
        usable = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("content") for m in prompt)
        if not usable or truth in (None, "", []) or ability not in ("math", "code"):
            bad.append(where)
            continue
        messages = [dict(role=m["role"], content=m["content"]) for m in prompt]
        messages[-1]["content"] += user_suffix
        if system_prompt is not None:
            messages = [m for m in messages if m["role"] != "system"]
            messages = [dict(role="system", content=system_prompt)] + messages if system_prompt else messages
        problem_id = next((row[k] for k in ("problem_id", "id", "unique_id", "task_id") if row.get(k) is not None), index)
        problems.append(dict(id=problem_id, problem=prompt[-1]["content"], messages=messages, ability=ability,
                             ground_truth=truth if isinstance(truth, (list, dict)) else str(truth)))
    report_bad(bad, len(bad) + len(problems), max_bad_share, f"has no usable {prompt_key!r} or {answer_key!r}")
    if not problems:
        raise UserError(f"{source}: no row has a usable {prompt_key!r} and {answer_key!r}")
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
        with open(chat_template, encoding="utf-8") as f:
            tokenizer.chat_template = f.read()
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template: set --chat_template to a .jinja file (config/ has some)")
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
    bos = tokenizer.bos_token_id
    return [bos] + ids if bos is not None and ids[:1] != [bos] and adds_bos(tokenizer) else ids


@functools.cache
def adds_bos(tokenizer):
    """Does this tokenizer put a begin-of-sequence token in front of plain text?"""
    return tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def render_prompt(tokenizer, messages):
    """Token ids of the conversation so far, ready for the assistant to go on: what sft.py trains after, too."""
    return encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def stop_tokens(tokenizer, path):
    """Ids that end an answer: the tokenizer's end token and those of the model's generation_config."""
    from transformers import GenerationConfig
    ids = {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:                 # the file is optional
        listed = None
    return sorted(ids | set(listed if isinstance(listed, list) else [listed] if listed is not None else []))


def sample_seed(*parts):
    """A seed made of anything that names a sample, (seed, problem id, k) say: the same whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# engines: .sample(requests, ...) yields (index, Sample) as answers finish, in any order

class Sample(NamedTuple):
    tokens: list                    # ids of the answer, the end token included
    logprobs: list                  # of each token, under the temperature it was sampled at
    finish_reason: str              # "stop": ended by itself; "length": cut


def make_engine(kind, path, tokenizer, device, dtype, max_model_len, tensor_parallel=1, gpu_memory=0.9, colocated=False):
    """A vLLM engine or one of transformers. kind: 'auto' | 'vllm' | 'hf'. dtype: a torch dtype.

    colocated: the engine shares process and card with a trainer (prime.py): it takes new weights from an iterator, and
    sleeps while the trainer works. Raises UserError when vLLM is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "vllm", "hf"):
        raise UserError(f"engine={kind!r}: 'auto', 'vllm' or 'hf'")
    if kind == "vllm" and not installed:
        raise UserError("engine='vllm', but vllm is not installed: pip install -r requirements-gpu.txt, or --engine=hf")
    make = VLLMEngine if kind == "vllm" or (kind == "auto" and installed) else HFEngine
    return make(path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated)


class VLLMEngine:
    """vLLM in this process (colocated) or as vLLM likes it. Requests wait in its queue, so that it is never idle."""
    name = "vllm"

    def __init__(self, path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated):
        options = dict(model=path, dtype=str(dtype).removeprefix("torch."), max_model_len=max_model_len, seed=0,
                       tensor_parallel_size=tensor_parallel, logprobs_mode="processed_logprobs", enable_prefix_caching=True)
        if colocated or device.type == "cpu":
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # in this process, so that weights can be handed over
        if colocated:
            options |= dict(distributed_executor_backend="external_launcher")
        if device.type == "cuda":
            options |= dict(gpu_memory_utilization=gpu_memory, enable_sleep_mode=colocated)
        else:                       # on a CPU gpu_memory_utilization means host memory, and compiling takes minutes
            options |= dict(kv_cache_memory_bytes=2**28, enforce_eager=True)
            if colocated:           # the packed copy of a tied lm_head is not rebuilt when weights are replaced
                import vllm._custom_ops
                vllm._custom_ops._supports_onednn = False
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams
        self.llm, self.params, self.device, self.stop = LLM(**options), SamplingParams, device, stop_tokens(tokenizer, path)
        self.dtype, self.max_model_len = dtype, max_model_len

    def sample(self, requests, temperature=1.0, top_p=1.0, max_tokens=1024, window=4096):
        """requests: iterable of (prompt ids, seed). Yields (index in requests, Sample) as they finish."""
        engine, waiting, running = self.llm.llm_engine, enumerate(requests), 0
        while True:
            for index, (ids, seed) in itertools.islice(waiting, window - running):
                params = self.params(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, logprobs=0,
                                     flat_logprobs=True, stop_token_ids=self.stop, detokenize=False)
                engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
                running += 1
            if not running:
                return
            for out in engine.step():
                if out.finished:
                    running -= 1
                    answer = out.outputs[0]
                    yield int(out.request_id), Sample(list(answer.token_ids), list(answer.logprobs.logprobs), answer.finish_reason)

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
    """transformers' forward pass and a sampling loop of our own: slower than vLLM, runs everywhere."""
    name = "hf"

    def __init__(self, path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated):
        from transformers import AutoModelForCausalLM, logging
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.device, self.max_model_len, self.stop = device, max_model_len, stop_tokens(tokenizer, path)

    def sample(self, requests, temperature=1.0, top_p=1.0, max_tokens=1024, batch_tokens=2**17, batch_rows=256):
        """requests: iterable of (prompt ids, seed). Yields (index in requests, Sample) as they finish."""
        requests = sorted(enumerate(requests), key=lambda r: len(r[1][0]))      # alike lengths share a batch
        rows = max(1, min(batch_rows, batch_tokens // min(self.max_model_len, max_tokens + 1)))
        for start in range(0, len(requests), rows):
            yield from self._sample_batch(requests[start:start + rows], temperature, top_p, max_tokens)

    def _sample_batch(self, requests, temperature, top_p, max_tokens):
        import torch
        from transformers import DynamicCache
        B, P = len(requests), max(len(ids) for _, (ids, _) in requests)
        ids = torch.zeros(B, P, dtype=torch.long)
        mask = torch.zeros(B, P, dtype=torch.long)                  # prompts are left-padded
        for row, (_, (prompt, _)) in enumerate(requests):
            ids[row, P - len(prompt):], mask[row, P - len(prompt):] = torch.tensor(prompt), 1
        # One uniform number a token, drawn from the row's own seed: a sample does not depend on the batch around it.
        uniform = torch.stack([torch.rand(max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                               for _, (_, seed) in requests]).to(self.device)                       # [B, max_tokens]
        limit = torch.tensor([min(max_tokens, self.max_model_len - len(prompt)) for _, (prompt, _) in requests])
        ids, mask, cache, row = ids.to(self.device), mask.to(self.device), DynamicCache(), torch.arange(B)
        position, stop = mask.cumsum(1).sub_(1).clamp_(min=0), torch.tensor(self.stop)
        answers, logprobs, alive = [[] for _ in range(B)], [[] for _ in range(B)], torch.ones(B, dtype=torch.bool)
        for t in range(max_tokens):
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                    use_cache=True, logits_to_keep=1).logits[:, -1].float()         # [B, V]
                logp = (logits / (temperature or 1.0)).log_softmax(-1)
                if temperature == 0:
                    token = logp.argmax(-1)
                else:
                    p = logp.double().exp()
                    if top_p < 1:                                   # keep the fewest tokens that hold top_p of the mass
                        sorted_p, order = p.sort(-1, descending=True)
                        sorted_p[sorted_p.cumsum(-1) - sorted_p >= top_p] = 0
                        p = torch.zeros_like(p).scatter_(-1, order, sorted_p)
                        logp = (p / p.sum(-1, keepdim=True)).log()
                    cdf = p.cumsum(-1)                              # the token whose share of [0, 1] holds the number
                    token = torch.searchsorted(cdf, uniform[row, t:t + 1] * cdf[:, -1:], right=True).squeeze(-1)
                    token = token.clamp_(max=p.shape[-1] - 1)
                chosen = logp.gather(-1, token[:, None]).squeeze(-1)
            tokens, values = token.cpu(), chosen.cpu()
            ended = torch.isin(tokens, stop)
            for i in alive.nonzero().squeeze(-1).tolist():
                r = int(row[i])
                answers[r].append(int(tokens[i])), logprobs[r].append(float(values[i]))
                if ended[i] or t + 1 >= limit[r]:
                    alive[i] = False
                    yield requests[r][0], Sample(answers[r], logprobs[r], "stop" if ended[i] else "length")
            if not alive.any():
                return
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            if alive.sum() <= 0.75 * len(alive):                    # finished rows leave now and then: leaving copies the cache
                keep = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(keep.to(self.device))
                ids, position, mask, row, alive = ids[keep], position[keep], mask[keep], row[keep], alive[keep]

    def load_weights(self, named):
        """Replace the weights by an iterator of (name, full tensor)."""
        own = self.model.state_dict()
        for name, tensor in named:
            own[name].copy_(tensor)

    def sleep(self):
        pass

    def close(self):
        pass


def pick_device(device, dtype):
    """(torch.device, torch dtype) of the settings. Raises UserError for cuda without a GPU, or a name torch does not have."""
    import torch
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device!r}: 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch sees no GPU here: --device=cpu, or install a CUDA build of torch")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"dtype={dtype!r}: 'auto', 'bfloat16' or 'float32'")
    return device, getattr(torch, ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype)


def stream_answers(engine, grader, tokenizer, jobs, path, sampling):
    """Sample, grade while sampling goes on, and append each answer to a .jsonl file as it is finished.

    jobs: list of (prompt ids, seed, reference for the grader, row); row gets response, correct, finish_reason, n_tokens."""
    from tqdm import tqdm
    written, right, tokens, start, pending = 0, 0, 0, time.time(), deque()
    with open(path, "a", encoding="utf-8") as out, tqdm(total=len(jobs), unit="answer", smoothing=0.05) as bar:
        for index, answer in itertools.chain(engine.sample([(ids, seed) for ids, seed, _, _ in jobs], **sampling), [(None, None)]):
            if answer is not None:
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                row = jobs[index][3] | dict(response=text, finish_reason=answer.finish_reason, n_tokens=len(answer.tokens))
                pending.append((row, grader.submit(text, jobs[index][2])))
                tokens += len(answer.tokens)
            while pending and (answer is None or pending[0][1].done()):     # None: all is sampled, wait for the last verdicts
                row, outcome = pending.popleft()
                row["correct"] = outcome.result() == 1.0
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                written, right = written + 1, right + row["correct"]
                bar.update()
            out.flush()
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tok/s, {right / max(1, written):.1%} correct", refresh=False)


def resume_rows(path, same):
    """The rows that are in a .jsonl file already; a last line that a kill cut short is removed. UserError: other settings."""
    rows, whole = [], 0
    if os.path.exists(path):
        with open(path, "rb+") as f:
            for line in f:
                if not line.endswith(b"\n"):
                    f.truncate(whole)                               # made again, with the same seed
                    break
                whole += len(line)
                rows.append(json.loads(line))
                other = {k: rows[-1].get(k) for k in same if rows[-1].get(k) != same[k]}
                if other:
                    raise UserError(f"{path} was begun with {other}, now it is {same}: set another --out_dir, or the settings of before")
    return rows


# ---------------------------------------------------------------------------------------------------------------------

def main():
    import torch
    from grader import Grader

    if samples_per_problem < 1 or max_tokens < 1:
        raise UserError("samples_per_problem and max_tokens must be at least 1")
    torch_device, torch_dtype = pick_device(device, dtype)
    problems = load_problems(data, split, data_config, problem_column, answer_column, system_prompt, user_suffix,
                             max_problems, max_bad_share)
    tokenizer = load_tokenizer(model)
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, "samples.jsonl")
    sampling = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens)

    done = {(str(row["problem_id"]), row["sample"]) for row in resume_rows(path, dict(model=model, sampling=sampling))}
    todo = [(p, k) for p in problems for k in range(samples_per_problem) if (str(p["id"]), k) not in done]
    print(f"{len(problems)} problems x {samples_per_problem} samples; {len(done)} rows are there, {len(todo)} to sample")

    jobs, skipped = [], 0
    for p, k in todo:
        ids, job_seed = render_prompt(tokenizer, p["messages"]), sample_seed(seed, str(p["id"]), k)
        if len(ids) > max_prompt_tokens:
            skipped += 1
            continue
        row = dict(problem_id=p["id"], sample=k, problem=p["problem"], ground_truth=p["ground_truth"], model=model,
                   sampling=sampling, seed=job_seed)
        jobs.append((ids, job_seed, dict(ability=p["ability"], ground_truth=p["ground_truth"]), row))
    if skipped:
        print(f"{skipped} samples skipped: their prompt is longer than max_prompt_tokens={max_prompt_tokens}")
    if jobs:
        print("first prompt:\n" + tokenizer.decode(jobs[0][0]))
        sampler = make_engine(engine, model, tokenizer, torch_device, torch_dtype, max_prompt_tokens + max_tokens,
                              tensor_parallel or max(1, torch.cuda.device_count()), gpu_memory)
        print(f"engine: {sampler.name}", flush=True)
        with Grader(workers=grade_workers, timeout=grade_timeout) as grader:
            stream_answers(sampler, grader, tokenizer, jobs, path, sampling)
        sampler.close()
    write_sft_set(path, {str(p["id"]): p for p in problems})


def write_sft_set(path, problems):
    """samples.jsonl -> sft.jsonl: answers that are right, ended by themselves and are short enough, as `messages` rows."""
    import grader
    sft_path, count, tokens = os.path.join(os.path.dirname(path), "sft.jsonl"), Counter(), 0
    with open(path, encoding="utf-8") as f, open(sft_path + ".tmp", "w", encoding="utf-8") as out:
        for line in f:
            row = json.loads(line)
            count["answers"] += 1
            tokens += row["n_tokens"]
            cut = row["finish_reason"] == "length"
            if cut or not row["correct"]:
                count["truncated" if cut else "wrong" if grader.extract_answer(row["response"]) else "no box"] += 1
                continue
            if row["n_tokens"] > sft_max_tokens:
                count["too long"] += 1
                continue
            count["kept"] += 1
            user = problems[str(row["problem_id"])]["messages"][-1] if str(row["problem_id"]) in problems else \
                dict(role="user", content=row["problem"])
            system = [dict(role="system", content=sft_system_prompt)] if sft_system_prompt else []
            messages = system + [user, dict(role="assistant", content=row["response"])]
            out.write(json.dumps(dict(messages=messages, ground_truth=row["ground_truth"], id=row["problem_id"]),
                                 ensure_ascii=False) + "\n")
    os.replace(sft_path + ".tmp", sft_path)
    n = max(1, count["answers"])
    print(f"{count['answers']} answers, {tokens / n:.0f} tokens on average: " +
          ", ".join(f"{count[k]} {k} ({count[k] / n:.1%})" for k in ("kept", "wrong", "no box", "truncated", "too long")))
    print(f"wrote {sft_path}")
    if not count["kept"]:
        raise UserError(f"no answer in {path} is right: {sft_path} is empty; try more samples_per_problem or another model")


if __name__ == "__main__":
    configurator.run(main, globals())
