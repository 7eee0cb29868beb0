"""
Sample a teacher, grade the answers, keep the correct ones: the data set of supervised fine-tuning.

    python generate.py                                             # INTELLECT-MATH: QwQ-32B-Preview on NuminaMath, all GPUs
    python generate.py config/toy_generate.py                      # a laptop: the built-in world

Every answer is one row of `samples.jsonl`, written when it is finished. Started again, the script goes on where it was.
The rows that are right and not too long become `sft.jsonl` (`messages` rows), which sft.py reads.
What is left out on purpose: batch files, several nodes, an HTTP server.
"""
import ast, collections, concurrent.futures, contextlib, gzip, hashlib, importlib.util, json, os, pathlib, re, types
from itertools import count, groupby, islice, takewhile
import jinja2, torch
from configurator import UserError, run, values
from grader import Grader, extract_answer, grade_code, run_python
from runs import plan
from runs.sandbox import REPLAY

# --- problems
data = 'PrimeIntellect/NuminaMath-groundtruth'  # hub id, or a .jsonl / .json / .parquet file
data_config: str = None             # the hub data set's configuration
split = 'train'                     # the hub data set's split
problem_column: str = None          # None: prompt (messages), problem, question or instruction, whichever is there
answer_column: str = None           # None: ground_truth, reward_model, answer, final_answer or solution
max_problems: int = None            # only the first so many
max_bad_share = 0.01                # malformed rows are counted and reported; more than this share of them is an error
sft_system_prompt = (               # published: what the student is told
    'Solve the following math problem efficiently and clearly. Think carefully and step by step about your response and reason '
    'before providing a final response. Conclude your response with: \n\nTherefore, the final answer is: $\\boxed{answer}$. '
    'I hope it is correct.\n\nWhere [answer] is just the final number or expression that solves the problem.')
system_prompt = sft_system_prompt + (   # what the teacher is told: published, but for the wording of this sentence, ours
    ' If it is a multiple choice question, [answer] is the letter of your choice.')
# --- teacher
model = 'Qwen/QwQ-32B-Preview'      # hub id or folder
engine = 'auto'                     # 'vllm', 'hf' (transformers), 'auto': vllm where it is installed
device = 'auto'                     # 'cuda', 'cpu', 'auto': cuda where there is one
dtype = 'auto'                      # 'bfloat16', 'float32', 'auto': bfloat16 on cuda, float32 on cpu
tensor_parallel: int = None         # GPUs a model is spread over (vllm); None: of this machine, as many as divide its heads
gpu_memory = 0.9                    # share of each card for the engine (vllm)
# --- sampling
samples_per_problem = 2             # published: 2 a question
temperature = 0.9                   # published
top_p = 1.0                         # published: the engine's default
max_prompt_tokens = 2048            # longer prompts are skipped and counted
max_tokens = 8192                   # published: new tokens a sample
seed = 0                            # sample k of a problem has a seed of its own, made of this, the problem's id and k
tir = False                         # the answer may call Python, as NuminaMath-7B-TIR's do: see sample()
tir_rounds = 4                      # times the model writes: one more than programs run (Numina: 4)
tir_timeout = 5.0                   # seconds a program (Numina: 5)
sandbox = 'auto'                    # of programs: 'auto' (the best there is, said at start) or 'required' (bubblewrap)
tir_numina = False                  # the very rules of Numina's notebook: see sample()
# --- grading and output
grade_workers: int = None           # processes; None: one a core
dry_run = False                     # print what answers take of a card, and end
out_dir = 'out/generate'            # samples.jsonl and sft.jsonl
sft_max_tokens = 4500               # longer answers stay out of sft.jsonl (published: unknown; the script's 512 drops most)

def read_rows(source, split="train", config=None, max_bad_share=0.01):
    """List of (where, row) of a .jsonl[.gz], .json or .parquet file or a data set of the Hugging Face hub; `where` names the
    row ("file.jsonl line 7"). Rows that are no JSON object are reported and skipped. UserError: nothing there, too many bad."""
    name = os.fspath(source)
    try:
        if name.endswith((".jsonl", ".jsonl.gz")):
            with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8", errors="replace") as f:
                rows = [(f"{name} line {number}", parse(line)) for number, line in enumerate(f, 1) if line.strip()]
        elif name.endswith(".json"):            # not by `datasets`, which makes dates of strings like 2020-01-01
            rows = [(f"{name} row {number}", row) for number, row in enumerate(json.loads(pathlib.Path(name).read_bytes()))]
        else:
            from datasets import Dataset, load_dataset
            table = Dataset.from_parquet(name) if name.endswith(".parquet") else load_dataset(name, config, split=split)
            rows = [(f"{name} row {number}", row) for number, row in enumerate(table)]
    except Exception as e:                      # `datasets` raises a dozen kinds: not found, no network, no such split
        raise UserError(f"cannot load the data set {name!r} (split {split!r}): {e!s:.200}") from None
    if not rows:
        raise UserError(f"{name} has no rows")
    report_bad([where for where, row in rows if not isinstance(row, dict)], len(rows), max_bad_share, "not a JSON object")
    return [(where, row) for where, row in rows if isinstance(row, dict)]

def parse(line):
    with contextlib.suppress(ValueError):       # it is reported as no JSON object
        return json.loads(line)

def report_bad(bad, total, max_share, what):
    """Print how many rows (their places in `bad`) are skipped. UserError: more than max_share of the total, or all."""
    line = f"{len(bad)} of {total} rows skipped ({what}): {', '.join(bad[:4])}"
    if len(bad) > max_share * total or len(bad) == total:
        raise UserError(f"{line}; more than max_bad_share={max_share} is not accepted: mend the file")
    if bad:
        print(line, flush=True)

def load_problems(source, split="train", config=None, problem_column=None, answer_column=None, system_prompt=None,
                  user_suffix="", max_problems=None, max_bad_share=0.01, rows=None, code_suffix=None):
    """List of dicts: id, problem (the user's text), messages, ability ("math" | "code"), ground_truth. Knows the columns of
    NuminaMath, GSM8K and Eurus-2-RL-Data. system_prompt replaces the row's, None leaves it; code_suffix: the user_suffix of
    code; rows: those of read_rows(source). UserError: column, file."""
    rows = rows or read_rows(source, split, config, max_bad_share)
    columns, problems, bad = rows[0][1].keys(), [], []
    def find(column, *names):
        return column or next((name for name in names if name in columns), names[0])
    prompt_key = find(problem_column, "prompt", "problem", "question", "instruction", "Problem")
    answer_key = find(answer_column, "ground_truth", "reward_model", "answer", "final_answer", "solution", "Answer")
    if missing := {prompt_key, answer_key} - columns:
        raise UserError(f"{source} has no column {' and no '.join(sorted(missing))}; it has {', '.join(sorted(columns))}: "
                        "set --problem_column and --answer_column")
    for index, (where, row) in enumerate(rows[:max_problems]):
        prompt, truth, ability = row.get(prompt_key), row.get(answer_key), row.get("ability") or "math"
        truth = truth.get("ground_truth", truth) if isinstance(truth, dict) else truth          # tests may be a dict
        if isinstance(truth, str) and (last := re.search(r"#### *(-?[\d.,]+)\s*$", truth)):      # GSM8K; not a heading
            truth = last[1].replace(",", "")
        truth = int(truth) if isinstance(truth, float) and truth.is_integer() else truth        # AMC's golds are floats: 36.0
        prompt = [dict(role="user", content=prompt)] if isinstance(prompt, str) and prompt.strip() else prompt
        try:                                                    # a row can be anything
            if not (all(m["role"] and m["content"].strip() for m in prompt) and prompt[-1]["role"] != "system" and truth not in
                    (None, "", []) and (ability == "math" or ability == "code" and grade_code("", truth) == 0)):
                raise ValueError
        except Exception:
            bad.append(where)
            continue
        kept = [dict(role=m["role"], content=m["content"]) for m in prompt if system_prompt is None or m["role"] != "system"]
        kept[-1]["content"] += user_suffix if ability == "math" or code_suffix is None else code_suffix
        messages = [dict(role="system", content=system_prompt)] * bool(system_prompt) + kept
        problem_id = next((row[k] for k in ("problem_id", "id", "unique_id", "task_id") if row.get(k) is not None), index)
        problems.append(dict(id=problem_id, problem=prompt[-1]["content"], messages=messages, ability=ability,
                             ground_truth=truth if isinstance(truth, (list, dict)) else str(truth)))
    report_bad(bad, len(bad) + len(problems), max_bad_share, f"no usable {prompt_key!r}, {answer_key!r} or 'ability'")
    return problems

def load_tokenizer(path, chat_template=None):
    """The tokenizer of a model, folder or hub id; chat_template: a .jinja file that replaces its own. UserError: not found."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = pathlib.Path(chat_template).read_text("utf-8") if chat_template else tokenizer.chat_template
    except (OSError, ValueError) as e:              # no such folder, hub id or file, no network
        raise UserError(f"cannot load {path!r}, folder or hub id: {str(e).partition(chr(10))[0]}") from None
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template: set --chat_template to a .jinja file")
    return tokenizer

def encode(tokenizer, text):
    """Token ids of rendered text, with the one begin-of-sequence token that the tokenizer would put there."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    return ids if ids[:1] == begin else begin + ids

def render_prompt(tokenizer, messages):
    """Token ids of the conversation so far, ready for the assistant to go on. UserError: the chat template refuses it."""
    try:
        return encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template takes no conversation like {str(messages)[:200]}: {e}") from None

def stop_tokens(tokenizer, path):
    """Sorted ids that end an answer: the tokenizer's end token and those of the model's generation_config."""
    from transformers import GenerationConfig
    ids = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):              # the file is optional
        listed = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(listed if isinstance(listed, list) else [listed])
    return sorted(ids - {None})

def sample_seed(*parts):
    """A seed made of anything that names a sample, (seed, problem id, k) say: the same whatever runs beside it."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")

# ------------------------------------------------------------ engines
# tokens: ids, the end token too; logprobs: of each, at the temperature it was sampled at; finish_reason: "stop" (by itself),
# "length" (cut), "string" (at `stop`), more in sample(); mask: 1 the model's, 0 its tool's, None: all 1
Sample = collections.namedtuple("Sample", "tokens logprobs finish_reason mask", defaults=[None])
SAMPLING = dict(temperature=1.0, top_p=1.0, stop=None, max_tokens=1024)         # stop: a string that ends an answer, and stays

def make_engine(kind, path, tokenizer, device, dtype, max_model_len, tensor_parallel=None, gpu_memory=0.9, colocated=False):
    """A vLLM engine or one of transformers. colocated: it shares process and card with prime.py. UserError: not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "hf") and not (kind == "vllm" and installed):
        raise UserError(f"engine={kind!r}: 'auto', 'hf', or 'vllm' after pip install -r requirements-gpu.txt")
    if kind == "hf" or not installed:
        return HFEngine(path, tokenizer, device, dtype, max_model_len)
    return VLLMEngine(path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated)

class VLLMEngine:
    """vLLM in this process (colocated) or as vLLM likes it."""
    def __init__(self, path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated):
        cuda = device.type == "cuda"
        if colocated or not cuda:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # in this process, so that weights can be handed over
        if colocated and not cuda:  # the packed copy of a tied lm_head is not rebuilt when weights are replaced
            import vllm._custom_ops
            vllm._custom_ops._supports_onednn = False
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM
        # on a CPU gpu_memory_utilization means host memory, and compiling takes minutes
        more = dict(gpu_memory_utilization=gpu_memory) if cuda else dict(kv_cache_memory_bytes=2**28, enforce_eager=True)
        cards = tensor_parallel or (1 if colocated else plan.spread(path, torch.cuda.device_count()))
        self.llm = LLM(path, dtype=dtype, max_model_len=max_model_len, seed=0, logprobs_mode="processed_logprobs",
                       tensor_parallel_size=cards, enable_sleep_mode=colocated and cuda, enable_prefix_caching=True,
                       distributed_executor_backend="external_launcher" if colocated else None, **more)
        self.name, self.device, self.dtype, self.max_model_len = "vllm", device, dtype, max_model_len
        self.stop = stop_tokens(tokenizer, path)

    def sample(self, requests, window=4096):
        """requests: (prompt ids, seed, what differs from SAMPLING), taken while fewer than `window` run; a None: no more just
        now, or ever if none runs. Yields (index of the request, Sample) as they finish."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        engine, waiting, index = self.llm.llm_engine, iter(requests), count()
        while True:
            for ids, seed, own in islice(takewhile(bool, waiting), window - engine.get_num_unfinished_requests()):
                params = SamplingParams(**SAMPLING | own, seed=seed, logprobs=0, flat_logprobs=True, stop_token_ids=self.stop,
                                        include_stop_str_in_output=True, detokenize=own.get("stop") is not None,
                                        output_kind=RequestOutputKind.FINAL_ONLY)
                engine.add_request(str(next(index)), {"prompt_token_ids": list(ids)}, params)
            if not engine.has_unfinished_requests():
                return
            for out in [out for out in engine.step() if out.finished]:
                answer = out.outputs[0]
                reason = "string" if isinstance(answer.stop_reason, str) else answer.finish_reason
                yield int(out.request_id), Sample(list(answer.token_ids), list(answer.logprobs.logprobs), reason)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # also destroys torch's process group: the last thing a script does

class HFEngine:
    """transformers' generate() with random numbers of our own: slower than vLLM, runs everywhere."""
    def __init__(self, path, tokenizer, device, dtype, max_model_len):
        from transformers import AutoModelForCausalLM, GenerationConfig
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        self.model.generation_config = GenerationConfig()           # no repetition penalty and the like behind our back
        self.name, self.device, self.tokenizer, self.stop = "hf", device, tokenizer, stop_tokens(tokenizer, path)
        self.max_model_len, self.rows = max_model_len, max(1, min(256, 2**17 // max_model_len))     # rows that fit in memory

    def sample(self, requests, window=4096):
        """As VLLMEngine.sample(); up to `window` requests are answered batch by batch, alike ones together, then it asks."""
        waiting, index, kind = iter(requests), count(), lambda job: (job[3]["temperature"], job[3]["top_p"], job[3]["stop"])
        while jobs := [(next(index), ids, seed, SAMPLING | own) for ids, seed, own in islice(takewhile(bool, waiting), window)]:
            jobs.sort(key=lambda job: (str(kind(job)), len(job[1])))
            for alike, group in groupby(jobs, kind):
                while batch := list(islice(group, self.rows)):
                    yield from self._sample_batch(*zip(*batch), *alike)

    def _sample_batch(self, numbers, prompts, seeds, own, temperature, top_p, stop):
        from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
        P, logprobs, decode = max(map(len, prompts)), [], self.tokenizer.decode
        limits = [min(sampling["max_tokens"], self.max_model_len - len(prompt)) for sampling, prompt in zip(own, prompts)]
        ids = torch.tensor([[-1] * (P - len(prompt)) + prompt for prompt in prompts], device=self.device)           # [B, P]
        # One uniform number a token, drawn from the row's own seed: a sample does not depend on the batch around it.
        uniform = torch.stack([torch.rand(max(limits), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                               for seed in seeds]).to(self.device)                                                  # [B, T]

        def choose(_, logits):      # [B, V] -> the same with -inf for all tokens but one, the one that generate() will take
            logp = logits.log_softmax(-1)
            cdf, t = logp.double().exp().cumsum(-1), len(logprobs)  # the token whose share of [0, 1] holds the number
            token = torch.searchsorted(cdf, uniform[:, t:t + 1] * cdf[:, -1:], right=True).clamp_(max=logp.shape[-1] - 1)
            token = token if temperature else logp.argmax(-1, keepdim=True)
            logprobs.append(logp.gather(-1, token).squeeze(-1))
            return torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)
        said = lambda ids, _: torch.tensor([stop in decode(row[P:][-4 * len(stop):]) for row in ids]).to(ids.device)    # bytes
        warp = [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)] if temperature else []
        out = self.model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(), logits_processor=[*warp, choose],
                                  stopping_criteria=[said] if stop else None, max_new_tokens=max(limits),
                                  eos_token_id=self.stop, pad_token_id=self.stop[0])[:, P:].tolist()
        for number, limit, tokens, values in zip(numbers, limits, out, torch.stack(logprobs, 1).tolist()):
            tokens = tokens[:limit]
            length = next((t for t, token in enumerate(tokens) if token in self.stop), len(tokens))
            called = stop and stop in decode(tokens[:length])        # if so, padding follows
            reason = "string" if called else "stop" if length < len(tokens) else "length"
            length += reason == "stop"
            yield number, Sample(tokens[:length], values[:length], reason)
    close = lambda self: None                       # there is nothing to hand back

# ------------------------------------------------------------ answers that call Python
TOOL_STOP, TOOL_END = "```output\n", "\n```"    # how the model calls its tool; what comes after the tool's words
TOOL_IMPORTS = "import math\nimport numpy as np\nimport sympy as sp\n"       # as in Numina's notebook
TOOL = dict(rounds=0, tool_timeout=5.0, numina=False)                           # see sample(); no rounds: no tool
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)

def run_tool(code, earlier, timeout=5.0, numina=False):
    """(what the model is shown of its program's run, did it succeed): what it printed and the value of its last line, or
    the error; 200 characters. earlier: programs of the same answer; what they defined is there, what they printed is not.
    numina: the last line becomes print(line) unless it prints (a syntax error if it is no expression); nothing is left."""
    code = re.sub("\r\n?", "\n", code)                               # a new line to Python, too
    lines, before = code.rstrip().split("\n"), TOOL_IMPORTS
    if numina and "print(" not in lines[-1]:
        lines[-1] = f"print({lines[-1].split('#')[0]})"
    if not numina:
        before += f"{REPLAY}replay({earlier!r})\ndel replay"
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):     # the run will tell the model
            *_, last = ast.parse(code).body
            if isinstance(last, ast.Expr) and getattr(getattr(last.value, "func", None), "id", "") != "print":
                start = lines[last.lineno - 1].encode()[:last.col_offset].decode()      # columns count bytes; \n ends a comment
                lines[last.lineno - 1:] = [f"{start}_ = ({ast.get_source_segment(code, last)}\n)", "if _ is not None: print(_)"]
    result = run_python("\n".join(lines), timeout=timeout, prelude=before)
    ok = result.returncode == 0 and not result.timed_out
    shown = f"Timed out after {timeout:g} seconds." if result.timed_out else (result.stdout if ok else result.stderr).strip()
    shown = shown if len(shown) <= 200 else shown[:200] + " ... (output truncated)"
    return shown.replace("```", "'''"), ok                          # a fence of its own would end the block

def next_move(text, reason, numina=False):
    """What a conversation does after the engine stopped for `reason`: "call" its tool, go "on", start "again", or end as
    "stop" (answered), "length" or "malformed" (a call without a new program). See sample() for numina."""
    blocks = [language for language, _ in FENCE.findall(text)]
    if numina and "python" not in blocks:
        return "again"
    if reason == "string":
        return "call" if numina or blocks[-1:] == ["python"] else "malformed"
    if not numina:
        return reason
    if not re.search(r"answer is|\\boxed", text[-100:]):
        return "again"
    return "on" if "output" in blocks else "malformed"

def sample(engine, tokenizer, requests, live=4096):
    """engine.sample() with a Python interpreter in the loop, as NuminaMath-7B-TIR has it: an answer stops at ```output, its
    last program runs, the result goes on the answer, and so on for `rounds` rounds. requests: list of (prompt ids, seed, what
    differs from SAMPLING and TOOL). Up to `live` conversations advance, each on its own; programs run while the engine works.
    Yields (number of the request, Sample) as they end, with finish_reason "stop" (by itself), "length" (of max_tokens, the
    tool's included), "rounds" (calls in the last one, where no program runs), "malformed" (a call without a new program).
    numina: by kaggle-solution.ipynb of github.com/project-numina/aimo-progress-prize (differences: README)."""
    ready = collections.deque(types.SimpleNamespace(n=n, prompt=prompt, seed=seed, turn=0, tape=[], earlier=[], answered=[],
                                                    **SAMPLING | TOOL | own) for n, (prompt, seed, own) in enumerate(requests))
    for talk in ready:
        talk.max_tokens = min(talk.max_tokens, engine.max_model_len - len(talk.prompt))
    asked, programs, index = {}, {}, count()        # who is in the engine, by index; who waits for a program, by its future

    def next_requests():
        while True:
            # An idle engine waits for all programs: else timing would decide who shares a batch, and so the last digits.
            for program in [p for p in programs if p.done() or not asked]:
                talk, (shown, ok) = programs.pop(program), program.result()
                words = tokenizer(shown + TOOL_END, add_special_tokens=False).input_ids
                talk.tape += [(token, 0.0, 0) for token in words[:talk.max_tokens - len(talk.tape) - 1]]
                talk.earlier += [talk.code] * ok
                ready.appendleft(talk)              # before those that have not begun
            if ready and len(asked) + len(programs) < live:
                talk = asked[next(index)] = ready.popleft()
                yield talk.prompt + [token for token, *_ in talk.tape], talk.seed + talk.turn, dict(
                    temperature=talk.temperature, top_p=talk.top_p, stop=TOOL_STOP if talk.rounds else talk.stop,
                    max_tokens=talk.max_tokens - len(talk.tape))
            else:
                yield None
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, answer in engine.sample(next_requests()):
            talk = asked.pop(i)
            talk.turn += 1
            talk.tape += [(*pair, 1) for pair in zip(answer.tokens, answer.logprobs)]               # (token, logprob, mask)
            text = tokenizer.decode([token for token, *_ in talk.tape], skip_special_tokens=True) if talk.rounds else ""
            move = next_move(text, answer.finish_reason, talk.numina) if talk.rounds else answer.finish_reason
            if move == "on":
                talk.answered, talk.tape = talk.tape, talk.tape[:-1]                                # without its end token
            if move in ("call", "on", "again") and talk.turn == talk.rounds:
                move = "rounds"
            elif move in ("call", "on") and len(talk.tape) + 2 > talk.max_tokens:
                move = "length"
            if move == "call":
                talk.code = [code for language, code in FENCE.findall(text) if language == "python"][-1]
                programs[pool.submit(run_tool, talk.code, talk.earlier, talk.tool_timeout, talk.numina)] = talk
            elif move in ("on", "again"):
                talk.tape = talk.tape if move == "on" else []
                ready.appendleft(talk)
            else:
                tokens, logprobs, mask = map(list, zip(*(talk.answered or talk.tape)))
                yield talk.n, Sample(tokens, logprobs, "stop" if talk.answered or move == "string" else move, mask)

def stream_answers(engine, grader, tokenizer, jobs, path):
    """Sample, grade meanwhile, and append each answer to a .jsonl file as it is finished. jobs: list of (prompt ids, problem,
    row with seed and sampling); the row gets problem_id, ground_truth, response, finish_reason, n_tokens, correct, failure."""
    from tqdm import tqdm
    def graded():                                   # rows and their scores to be, in the order they were sampled
        pending = collections.deque()
        for number, answer in sample(engine, tokenizer, [(ids, row["seed"], row["sampling"]) for ids, _, row in jobs]):
            _, problem, row = jobs[number]
            text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
            row = row | dict(problem_id=problem["id"], ground_truth=problem["ground_truth"], response=text,
                             finish_reason=answer.finish_reason, n_tokens=len(answer.tokens))
            pending.append((row, grader.submit(text, problem)))
            while pending and pending[0][1].done():
                yield pending.popleft()
        yield from pending
    right, tokens, bar = 0, 0, tqdm(graded(), total=len(jobs), unit="answer", smoothing=0.05)
    with open(path, "a", encoding="utf-8", buffering=1) as out:
        for n, (row, score) in enumerate(bar, 1):
            row |= dict(correct=score.result() == 1.0, failure=score.result().failure)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            right, tokens = right + row["correct"], tokens + row["n_tokens"]
            bar.set_postfix_str(f"{tokens / (bar.format_dict['elapsed'] or 1):.0f} tok/s, {right / n:.1%} right", refresh=False)

def resume_rows(path, same):
    """The rows of a .jsonl file, made if it is not there; a last line that a kill cut short is removed. UserError: a row was
    made with other settings than `same`, {name: value}."""
    with open(path, "ab+") as f:
        f.seek(0)
        lines = f.read().split(b"\n")
        f.truncate(f.tell() - len(lines.pop()))                     # that answer is made again, with the same seed
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if other := {k: row.get(k) for k in same if row.get(k) != same[k]}:
            raise UserError(f"{path} was begun with {other}, now it is {same}: the settings of before, or another --out_dir")
    return rows

def write_sft_set(rows):
    """sft.jsonl, `messages` rows: of `rows` those that are right, ended by themselves and are short enough. And a summary."""
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    right = [row for row in ended if row["correct"]]
    kept = [row for row in right if row["n_tokens"] <= sft_max_tokens]
    no_box = sum(not extract_answer(row["response"]) for row in ended if not row["correct"])
    path = os.path.join(out_dir, "sft.jsonl")
    with open(path + ".tmp", "w", encoding="utf-8") as out:
        system = [dict(role="system", content=sft_system_prompt)] * bool(sft_system_prompt)
        for row in kept:
            messages = [*system, *row["messages"], dict(role="assistant", content=row["response"])]
            out.write(json.dumps(dict(messages=messages, ground_truth=row["ground_truth"], id=row["problem_id"])) + "\n")
    os.replace(path + ".tmp", path)
    print(f"{len(rows)} answers: {len(kept)} kept, {len(ended) - len(right) - no_box} wrong, {no_box} no box, "
          f"{len(rows) - len(ended)} not ended, {len(right) - len(kept)} too long; wrote {path}")
    if not kept:
        raise UserError(f"no answer is right: {path} is empty; try more samples_per_problem or another model")

def main():
    plan.dry_run("generate", globals())
    plan.check(globals(), dict.fromkeys(("samples_per_problem", "max_tokens", "tir_rounds", "max_problems"), 1))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("start generate.py with python, not torchrun: one process takes all GPUs")
    torch_device, torch_dtype = plan.pick_device(device, dtype)
    problems = load_problems(data, split, data_config, problem_column, answer_column, system_prompt,
                             max_problems=max_problems, max_bad_share=max_bad_share)
    tokenizer = load_tokenizer(model)
    plan.announce_sandbox(sandbox, tir or any(p["ability"] == "code" for p in problems))
    plan.write_run_config(out_dir, values(globals()))
    path = os.path.join(out_dir, "samples.jsonl")
    tool = dict(rounds=tir_rounds, tool_timeout=tir_timeout, numina=tir_numina) if tir else {}
    same = dict(model=model, asked=[system_prompt, seed],
                sampling=dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens) | tool)
    done = {(str(row["problem_id"]), row["sample"], row["problem"]) for row in resume_rows(path, same)}
    longest = min(max_prompt_tokens, plan.positions(model) - 1)
    fitting = [(p, ids) for p in problems if len(ids := render_prompt(tokenizer, p["messages"])) <= longest]
    jobs = [(ids, p, same | dict(problem=p["problem"], sample=k, seed=sample_seed(seed, str(p["id"]), k),
                                 messages=[m for m in p["messages"] if m["role"] != "system"]))
            for p, ids in fitting for k in range(samples_per_problem) if (str(p["id"]), k, p["problem"]) not in done]
    print(f"{len(fitting)} problems x {samples_per_problem} samples, {len(problems) - len(fitting)} problems have more than "
          f"{longest} tokens; {len(done)} rows are there, {len(jobs)} to sample")
    if jobs:
        longest = min(max_prompt_tokens + max_tokens, plan.positions(model))
        sampler = make_engine(engine, model, tokenizer, torch_device, torch_dtype, longest, tensor_parallel, gpu_memory)
        print(f"engine: {sampler.name}; first prompt:\n{tokenizer.decode(jobs[0][0])}", flush=True)
        with Grader(workers=grade_workers) as grader:
            stream_answers(sampler, grader, tokenizer, jobs, path)
        sampler.close()
    write_sft_set(resume_rows(path, same))

if __name__ == "__main__":
    run(main, globals())
