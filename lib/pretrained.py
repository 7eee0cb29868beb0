"""What a model's folder or hub id holds beside weights: configuration, tokenizer, end tokens."""

import functools
import json
import math
import re
import tempfile
from pathlib import Path

from configurator import UserError
from lib.run import print0


def model_config(path):
    """The transformers configuration of a model, by folder or hub id.

    A configuration is returned as it is. Raises UserError if there is no such model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not isinstance(path, str):
        return path
    try:
        return AutoConfig.from_pretrained(path)
    except StrictDataclassError as error:
        # Values of config.json that contradict each other.
        raise UserError(cannot_load(path, error.__cause__ or error)) from None
    except Exception as error:
        # A config.json can say anything.
        raise UserError(cannot_load(path, as_value_error(error))) from None


def cannot_load(path: str, error: Exception) -> str:
    """One line for a folder or hub id that transformers could not load: not there, no network."""
    reason = str(error).partition("\n")[0]
    if reason.rstrip().endswith(":"):
        # The rest is a list.
        reason = " ".join(str(error).split())[:300]
    return f"cannot load {path!r}, folder or hub id: {reason}"


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


def vocabulary_size(path) -> int:
    """How many tokens a model knows. path: as for model_config()."""
    return model_config(path).get_text_config().vocab_size


def spread_gpus(path, gpus: int) -> int:
    """How many of `gpus` GPUs an engine can spread a model over: each takes as many heads."""
    return math.gcd(model_config(path).num_attention_heads, max(1, gpus))


# ----------------------------------------------------------------------------------------------
# tokenizers

# Text that tells tokenizers apart, and in which a tokenizer loses what it cannot write.
PROBE = (
    "Let $x_1 = 3.14$ and y = -12,345 + 67890; so be it!\n\n",
    "\\boxed{\\frac{1}{2}}  \\[a &= b\\\\\n c^{10} - d\\]\n",
    "```python\ndef f(n):\n    if n > 1:\n\t\treturn n * f(n - 1)  # n!\n\n\nprint(f(20))\n```\n",
    "I'll say it's HE'S, don't; __init__ 'q' \"w\" <p> [INST] 50% a/b @c #d ~e |f|\r\nend \n",
    "café naïve Straße Δα Жук 日本語。２０ १२\n",
    "— “so”… x² ≤ 5° 𝑥😀\n",
)
# Entries of the vocabulary that are tried as well.
PROBE_WORDS = 10_000


def load_tokenizer(path: str, chat_template: str | None = None):
    """The tokenizer of a model, by folder or hub id.

    chat_template: a .jinja file that replaces the tokenizer's own.
    Raises UserError if there is no such tokenizer or file, no chat template or end token, or if it
    does not give back the text that it was given.
    """
    try:
        tokenizer = open_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(cannot_load(path, error)) from None
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"chat_template: cannot read {chat_template}: {error}") from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template: set --chat_template to a .jinja file"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end token: name one as eos_token in its "
            "tokenizer_config.json"
        )
    check_round_trip(tokenizer, path)
    return tokenizer


def open_tokenizer(path: str):
    """The tokenizer that tokenizer.json describes; without this file what transformers makes.

    By the name in tokenizer_config.json, or the kind of model, transformers opens many as a class
    of its own, Llama's or Qwen2's say, which replaces parts of tokenizer.json. Byte-level ones
    then lose blanks and new lines (github.com/huggingface/transformers/issues/45488).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    trouble = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        # A class of its own may not take this tokenizer.json.
        trouble = error

    if not has_file(path, "tokenizer.json"):
        if trouble is not None:
            raise as_value_error(trouble)
        return without_clean_up(tokenizer)
    if trouble is None and type(tokenizer) is PreTrainedTokenizerFast:
        return without_clean_up(tokenizer)

    # What tokenizer.json says is what the model was trained with.
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:
        raise as_value_error(error) from None
    if trouble is None and differing_text(tokenizer, plain) is None:
        return without_clean_up(tokenizer)
    opened = type(trouble or tokenizer).__name__
    print_once(
        f"note: {path}: transformers opens this tokenizer as {opened}, which is not what its "
        "tokenizer.json says; tokenizer.json is used"
    )
    return without_clean_up(plain)


@functools.cache
def print_once(line: str) -> None:
    """Print a line on rank 0, the first time only."""
    print0(line)


def as_value_error(error: Exception) -> Exception:
    """The error itself, if load_tokenizer() puts it into words, else a ValueError of its text."""
    if isinstance(error, (OSError, ValueError)):
        return error
    return ValueError(f"{type(error).__name__}: {error}")


def has_file(path: str, name: str) -> bool:
    """Has this folder or hub id a file of this name?"""
    from transformers.utils import cached_file

    try:
        return cached_file(path, name) is not None
    except (OSError, ValueError):
        return False


def without_clean_up(tokenizer):
    """The tokenizer, so that decoding leaves the blanks before punctuation as they are."""
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def differing_text(tokenizer, other) -> str | None:
    """A text that two tokenizers encode or decode differently; None if no probe shows one.

    Probes are PROBE, all special and added tokens, and words of the other's vocabulary.
    """
    for text in probe_texts(other):
        for special in (False, True):
            ids = try_encode(tokenizer, text, special)
            if ids != try_encode(other, text, special):
                return text
        if tokenizer.decode(ids) != other.decode(ids):
            return text
        plain_text = other.decode(ids, skip_special_tokens=True)
        if tokenizer.decode(ids, skip_special_tokens=True) != plain_text:
            return text
    return None


def try_encode(tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids of a text; none if the tokenizer does not take it.

    Word-level tokenizers without a token for unknown words raise an exception. special: with the
    tokens that begin and end a text.
    """
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    except Exception:
        return []


def probe_texts(tokenizer) -> list[str]:
    """Texts that show how a tokenizer splits: PROBE, its added tokens, words that it knows."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    texts = [*PROBE, "".join(f"a{token} b\n{token}" for token in added)]

    # Words side by side meet all borders at which tokenizers may split differently.
    step = 1 + len(tokenizer) // PROBE_WORDS
    words = [tokenizer.decode([number]) for number in range(0, len(tokenizer), step)]
    for first in range(0, len(words), 50):
        texts.append("".join(words[first : first + 50]))
        texts.append("\n".join(words[first : first + 50]))
    return texts


def check_round_trip(tokenizer, path: str) -> None:
    """Raise UserError if decoding does not give back what was encoded.

    What the tokenizer's own normalizer changes is no loss. Signs that its vocabulary lacks are
    printed, unless it is the blank or the new line, without which no text is left.
    """
    unknown = unknown_signs(tokenizer)
    lost = " " in unknown or "\n" in unknown
    for text in PROBE:
        known = "".join(sign for sign in text if sign not in unknown)
        back = tokenizer.decode(try_encode(tokenizer, known))
        if lost or normal(tokenizer, back) != normal(tokenizer, known):
            raise UserError(
                f"the tokenizer of {path} does not give back the text that it is given: "
                f"{text[:40]!r} becomes {back[:40]!r}"
            )
    if unknown:
        print0(f"note: the tokenizer of {path} has no tokens for {' '.join(unknown)[:80]}")
    for text in PROBE:
        if text.isascii() and normal(tokenizer, text) != text:
            print0(
                f"note: the tokenizer of {path} changes a text before it is encoded: "
                f"{text[:40]!r} becomes {normal(tokenizer, text)[:40]!r}"
            )
            break


@functools.lru_cache(maxsize=8)
def unknown_signs(tokenizer) -> list[str]:
    """The signs of PROBE that the vocabulary lacks."""
    return [sign for sign in sorted(set("".join(PROBE))) if not is_known(tokenizer, sign)]


def is_known(tokenizer, sign: str) -> bool:
    """Does a sign come back, a blank from between two digits?"""
    if sign.strip():
        back = normal(tokenizer, tokenizer.decode(try_encode(tokenizer, sign)))
        return normal(tokenizer, sign).strip() in back
    text = f"1{sign}1"
    back = normal(tokenizer, tokenizer.decode(try_encode(tokenizer, text)))
    return back == normal(tokenizer, text)


def normal(tokenizer, text: str) -> str:
    """A text as the tokenizer's normalizer leaves it, without SentencePiece's sign for a blank."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return text.replace("\u2581", " ").removeprefix(" ")


def check_same_tokens(tokenizer, folder: str) -> None:
    """Raise UserError if transformers opens another tokenizer in a folder than was written there.

    The whole folder counts, config.json included. vLLM opens it in the same way.
    """
    difference = difference_when_opened(tokenizer, folder)
    if difference is not None:
        raise UserError(
            f"{folder}: transformers opens the tokenizer that was written there as another one, "
            f"which differs at {difference[:60]!r}: take --tokenizer of the model's own kind"
        )


def difference_when_opened(tokenizer, folder: str) -> str | None:
    """A text that what transformers opens in a folder encodes differently, or why it cannot."""
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # A class of its own may not take this tokenizer.json.
        return f"{type(error).__name__}: {error}"
    return differing_text(opened, tokenizer)


def save_tokenizer(tokenizer, folder: str) -> None:
    """Write a tokenizer beside a model's config.json, so that transformers opens just this one.

    Raises UserError if transformers opens another one all the same.
    """
    tokenizer.save_pretrained(folder)
    if difference_when_opened(tokenizer, folder) is None:
        return

    # Beside the configuration of some kinds of models (Qwen2) transformers takes a class of its own
    # whatever the files say, unless they name code of theirs. It is not run, and need not exist.
    path = Path(folder, "tokenizer_config.json")
    settings = json.loads(path.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenizer.TokenizerOfJson"]}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    check_same_tokens(tokenizer, folder)


def check_tokenizer_can_be_saved(tokenizer, path) -> None:
    """Raise UserError now if save_tokenizer() would, beside the configuration of this model.

    path: as for model_config().
    """
    with tempfile.TemporaryDirectory() as folder:
        model_config(path).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)


def check_same_tokenizer(path_a: str, path_b: str) -> None:
    """Raise UserError if a token id means other texts to two models, by folder or hub id.

    A model without tokenizer files beside its weights passes. So does one with fewer tokens.
    """
    if path_a == path_b:
        return
    try:
        other = open_tokenizer(path_b).get_vocab()
    except (OSError, ValueError):
        return
    token_of = {number: token for token, number in other.items()}
    for token, number in open_tokenizer(path_a).get_vocab().items():
        if token_of.get(number, token) != token:
            raise UserError(
                f"{path_b} has another tokenizer than {path_a}: "
                f"token {number} is {token_of[number]!r} there, {token!r} here"
            )


# ----------------------------------------------------------------------------------------------
# prompts and end tokens


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of rendered text, with the begin-of-sequence token that the tokenizer would add.

    It is never doubled: a chat template may have written it already.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]
    if ids[:1] == begin:
        return ids
    return begin + ids


def encode_after(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of a text that goes on after another one.

    Alone, SentencePiece would put a blank before it, as if it were the beginning of all.
    """
    alone = tokenizer(text, add_special_tokens=False).input_ids
    if not text or not looks_back(tokenizer):
        return alone

    # If a token would reach over the border, the text is taken as that of a new line.
    for context in (before, "\n"):
        head = tokenizer(context, add_special_tokens=False).input_ids
        whole = tokenizer(context + text, add_special_tokens=False).input_ids
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return alone


@functools.lru_cache(maxsize=8)
def looks_back(tokenizer) -> bool:
    """Do the ids of a text depend on what stands before it, a new line or a special token say?"""
    alone = try_encode(tokenizer, "1")
    if try_encode(tokenizer, "1\n1") != try_encode(tokenizer, "1\n") + alone:
        return True
    # Some special tokens swallow the blanks around them.
    return any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())


def encode_words(tokenizer, before: str, text: str) -> list[int]:
    """encode_after() of somebody's words, in which no text is a special token: not "<|im_end|>"."""
    ids = []
    for piece in split_special_tokens(tokenizer, text):
        ids += encode_after(tokenizer, before, piece)
        before += piece
    return ids


def split_special_tokens(tokenizer, text: str) -> list[str]:
    """The text in pieces of which none has a special token, nor an added one such as <think>.

    "a<|im_end|>b" becomes "a<" and "|im_end|>b".
    """
    pattern = special_tokens_pattern(tokenizer)
    pieces = []
    while pattern and (found := pattern.search(text)):
        pieces.append(text[: found.start() + 1])
        text = text[found.start() + 1 :]
    return [*pieces, text]


@functools.lru_cache(maxsize=8)
def special_tokens_pattern(tokenizer) -> re.Pattern | None:
    """Finds the tokens that only a template should write; None if there are none."""
    names = []
    for token in tokenizer.added_tokens_decoder.values():
        name = str(token)
        if len(name) > 1 and (token.special or name[0] in "<["):
            names.append(re.escape(name))
    return re.compile("|".join(names)) if names else None


def render_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of the conversation so far, ready for the assistant to continue.

    Raises UserError if the chat template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # A template can do anything.
        raise UserError(
            f"the chat template takes no conversation like {str(messages)[:200]}: {error}"
        ) from None
    return encode(tokenizer, text)


def prompt_trouble(tokenizer, messages: list[dict], vocabulary: int | None = None) -> str | None:
    """Why render_prompt() and a model of so many tokens cannot take a conversation; None: they can.

    vocabulary: None leaves out the tokens, which take most of the time.
    """
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # No tokenizer takes half a surrogate pair.
        text.encode()
    except Exception as error:
        return f"the chat template does not take it: {str(error)[:100]}"
    if not text.strip():
        return "the chat template makes nothing of it"
    if vocabulary is not None:
        try:
            last = max(encode(tokenizer, text), default=0)
        except Exception as error:
            return f"the tokenizer does not take it: {str(error)[:100]}"
        if last >= vocabulary:
            return f"token {last}, the model knows {vocabulary}"
    return None


def top_token(tokenizer) -> int:
    """The largest token id."""
    return max(tokenizer.get_vocab().values())


def stop_tokens(tokenizer, path: str) -> list[int]:
    """Sorted ids that end an answer: the tokenizer's and those that the model's files name.

    As transformers does, generation_config.json is asked first, then config.json.
    """
    ids = {tokenizer.eos_token_id, *named_end_tokens(path)}

    # The files of a model that comes with another tokenizer may mean other tokens by its numbers.
    if tokenizer.name_or_path != path:
        ids &= {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    return sorted(ids - {None})


def check_end_token(tokenizer, path: str) -> None:
    """Raise UserError if the model knows none of its end tokens, so that no answer would end.

    transformers adds an eos_token that tokenizer.json lacks, under a number of its own.
    """
    vocabulary = vocabulary_size(path)
    if min(stop_tokens(tokenizer, path), default=0) >= vocabulary:
        raise UserError(
            f"{path}: no answer would end, since its end token {tokenizer.eos_token!r} is token "
            f"{tokenizer.eos_token_id} and the model knows {vocabulary}: correct eos_token in "
            "tokenizer_config.json"
        )


def named_end_tokens(path: str) -> list[int]:
    """The end tokens in a model's generation_config.json, or config.json; neither has to be there.

    Raises UserError if one is there and cannot be read.
    """
    from transformers import GenerationConfig, PreTrainedConfig

    named = None
    try:
        if has_file(path, "generation_config.json"):
            named = GenerationConfig.from_pretrained(path).eos_token_id
        if named is None and has_file(path, "config.json"):
            # The file itself: a configuration object would fill in the number of its kind of model.
            settings, _ = PreTrainedConfig.get_config_dict(path)
            named = settings.get("eos_token_id")
            if named is None:
                named = (settings.get("text_config") or {}).get("eos_token_id")
    except Exception as error:
        # The files can say anything.
        raise UserError(cannot_load(path, as_value_error(error))) from None
    listed = named if isinstance(named, list) else [named]
    return [number for number in listed if isinstance(number, int) and number >= 0]
