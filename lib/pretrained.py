"""What a model's folder or hub id holds beside weights: configuration, tokenizer, end tokens."""

import contextlib
import math
from pathlib import Path

import jinja2

from configurator import UserError


def model_config(path):
    """The transformers configuration of a model, by folder or hub id.

    A configuration is returned as it is. Raises UserError if there is no such model.
    """
    from transformers import AutoConfig

    if not isinstance(path, str):
        return path
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(cannot_load(path, error)) from None


def cannot_load(path: str, error: Exception) -> str:
    """One line for a folder or hub id that transformers could not load: not there, no network."""
    first_line = str(error).partition("\n")[0]
    return f"cannot load {path!r}, folder or hub id: {first_line}"


def positions(path) -> int:
    """The longest sequence that a model was made for. path: as for model_config()."""
    return getattr(model_config(path), "max_position_embeddings", None) or 2**31


def check_positions(path, tokens: int) -> None:
    """Raise UserError if a model was made for shorter sequences than prompt and answer may be."""
    longest = positions(path)
    if tokens > longest:
        raise UserError(
            f"max_prompt_tokens + max_tokens = {tokens}, but {path} has {longest} positions: "
            "lower one of the two settings"
        )


def spread_gpus(path, gpus: int) -> int:
    """How many of `gpus` GPUs an engine can spread a model over: each takes as many heads."""
    return math.gcd(model_config(path).num_attention_heads, max(1, gpus))


def load_tokenizer(path: str, chat_template: str | None = None):
    """The tokenizer of a model, by folder or hub id.

    chat_template: a .jinja file that replaces the tokenizer's own.
    Raises UserError if there is no such tokenizer or file, or no chat template at all.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(cannot_load(path, error)) from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template: set --chat_template to a .jinja file"
        )
    return tokenizer


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of rendered text, with the begin-of-sequence token that the tokenizer would add.

    It is never doubled: a chat template may have written it already.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    if ids[:1] == begin:
        return ids
    return begin + ids


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of the conversation so far, ready for the assistant to continue.

    Raises UserError if the chat template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template takes no conversation like {str(messages)[:200]}: {error}"
        ) from None
    return encode(tokenizer, text)


def stop_tokens(tokenizer, path: str) -> list[int]:
    """Sorted ids that end an answer: the tokenizer's and those of the model's generation_config."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}

    # The file is optional.
    with contextlib.suppress(OSError):
        listed = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(listed if isinstance(listed, list) else [listed])
    return sorted(ids - {None})
