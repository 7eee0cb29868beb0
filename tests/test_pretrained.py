"""lib/pretrained.py: tokenizers that give back their text, in all kinds of folders; end tokens."""

import json
import os

import pytest
from conftest import ROOT, run
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteFallback, ByteLevel, Fuse, Replace, Strip
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.normalizers import NFC, Lowercase, Prepend
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer, Digits, Metaspace, Split, Whitespace
from tokenizers.pre_tokenizers import ByteLevel as Bytes
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from configurator import UserError
from lib.pretrained import (
    check_end_token,
    check_same_tokenizer,
    check_same_tokens,
    check_tokenizer_can_be_saved,
    encode,
    encode_words,
    load_tokenizer,
    prompt_trouble,
    render_prompt,
    save_tokenizer,
    split_special_tokens,
    stop_tokens,
)
from lib.problems import tokenize_messages

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# Words that are tokens, with blanks, several digits, new lines and signs that go together.
WORDS = ["Ġthe", "Ġsum", "the", "123", "45", "12", "\\boxed", "Ċ", "ĊĊ", "ĠĠĠ", ".Ċ", "'s", "é"]
TEXT = "the sum of 12345\n\n    and the rest is \\boxed{45}.\nIt's caf\u00e9 \u65e5\u672c"


def bpe(words, alphabet, **options):
    """A byte-pair encoding that has these words as tokens."""
    vocab = dict.fromkeys([*SPECIAL, *alphabet])
    merges = {}
    for word in words:
        for i in range(1, len(word)):
            vocab[word[: i + 1]] = None
            merges[word[:i], word[i]] = None
    numbered = {token: number for number, token in enumerate(vocab)}
    return BPE(vocab=numbered, merges=list(merges), **options)


def byte_level(split=None):
    """Like DeepSeekMath's: blanks and new lines are letters of its own, digits stand alone or not.

    split: what pieces are made before tokens are; None: pieces of any length.
    """
    tokenizer = Tokenizer(bpe(WORDS, sorted(Bytes.alphabet())))
    parts = [Bytes(add_prefix_space=False, use_regex=False)]
    if split is not None:
        parts.insert(0, split)
    tokenizer.pre_tokenizer = PreTokenizers(parts)
    tokenizer.decoder = ByteLevel()
    return finish(tokenizer)


def finish(tokenizer):
    """Special tokens, and a begin token before each text."""
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A",
        special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))],
    )
    return tokenizer


LETTERS = (
    "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]/<>{}\\|'.,:;!?+-*=#`\"_"
)


def sentence_piece(prefix="first"):
    """Like Llama-2's. prefix: in front of what a blank is put; "every": of all between specials."""
    letters = [*LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁the", "▁sum", "▁is", "▁[", "the", "is", "INST"]
    tokenizer = Tokenizer(bpe(words, letters, byte_fallback=True, fuse_unk=True))
    if prefix == "every":
        tokenizer.normalizer = Normalizers([Prepend("▁"), ReplaceText(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = Metaspace("▁", prepend_scheme=prefix, split=False)
    tokenizer.decoder = Decoders([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return finish(tokenizer)


SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def model_folder(path, tokenizer, config, **settings):
    """A folder with tokenizer.json, tokenizer_config.json and config.json; no weights."""
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = dict(
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    (path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    if config is not None:
        config(vocab_size=tokenizer.get_vocab_size()).save_pretrained(path)
    return str(path)


# ----------------------------------------------------------------------------------------------
# what tokenizer.json says

DIGITS = Digits(individual_digits=True)
LLAMA = dict(tokenizer_class="LlamaTokenizerFast", legacy=True, add_bos_token=True)


@pytest.mark.parametrize(
    "config, settings",
    [
        (LlamaConfig, LLAMA),
        (LlamaConfig, dict(LLAMA, legacy=False, tokenizer_class="LlamaTokenizer")),
        (LlamaConfig, dict(tokenizer_class="PreTrainedTokenizerFast")),
        (LlamaConfig, {}),
        (Qwen2Config, {}),
        (Qwen2Config, dict(tokenizer_class="LlamaTokenizerFast")),
        (Qwen2Config, dict(tokenizer_class="GPT2Tokenizer")),
        (Qwen3Config, LLAMA),
        (MistralConfig, LLAMA),
        (GPT2Config, dict(tokenizer_class="GPT2Tokenizer")),
        (None, dict(tokenizer_class="GPT2TokenizerFast")),
        (None, LLAMA),
    ],
)
@pytest.mark.parametrize("split", [None, DIGITS, Split(Regex(r"[\r\n]"), "isolated")])
def test_a_tokenizer_is_what_its_file_says(tmp_path, config, settings, split):
    """Whatever class transformers would make of it."""
    folder = model_folder(tmp_path / "m", byte_level(split), config, **settings)
    file = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT).input_ids == file.encode(TEXT).ids
    assert tokenizer.decode(encode(tokenizer, TEXT)[1:]) == TEXT
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("prefix", ["first", "every", "always"])
@pytest.mark.parametrize("legacy", [True, False])
def test_sentence_piece_is_what_its_file_says(tmp_path, prefix, legacy):
    folder = model_folder(
        tmp_path / "m", sentence_piece(prefix), LlamaConfig, **dict(LLAMA, legacy=legacy)
    )
    file = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer = load_tokenizer(folder)
    for text in (TEXT, "<|im_start|>the sum<|im_end|>\nis the"):
        assert tokenizer(text).input_ids == file.encode(text).ids
    assert tokenizer.decode(tokenizer(TEXT).input_ids[1:]) == TEXT


def test_a_class_that_replaces_parts_is_said(tmp_path, capsys):
    folder = model_folder(tmp_path / "m", byte_level(), LlamaConfig, **LLAMA)
    load_tokenizer(folder)
    load_tokenizer(folder)
    assert capsys.readouterr().out.count("tokenizer.json is used") == 1

    # One that opens as it is: no word.
    load_tokenizer(model_folder(tmp_path / "n", byte_level(), LlamaConfig))
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------
# what gets lost


def lossy(kind):
    """A tokenizer that does not give back blanks, new lines, or where they stood."""
    tokenizer = byte_level()
    if kind == "no decoder":
        tokenizer.decoder = None
    elif kind == "decoder of another kind":
        tokenizer.decoder = Decoders([Replace("▁", " "), Fuse()])
    elif kind == "blanks cut off":
        tokenizer.pre_tokenizer = PreTokenizers([Whitespace(), Bytes(add_prefix_space=False)])
    elif kind == "BERT":
        tokenizer.pre_tokenizer = PreTokenizers([BertPreTokenizer(), Bytes(use_regex=False)])
    elif kind == "sentence piece without new line":
        tokenizer = sentence_piece()
        tokenizer.model = bpe([], LETTERS)
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [
        "no decoder",
        "decoder of another kind",
        "blanks cut off",
        "BERT",
        "sentence piece without new line",
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, kind):
    folder = model_folder(tmp_path / "m", lossy(kind), None)
    with pytest.raises(UserError, match="does not give back the text") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_what_a_normalizer_changes_is_no_loss(tmp_path, capsys):
    """It is said if it changes plain text."""
    tokenizer = byte_level()
    tokenizer.normalizer = NFC()
    load_tokenizer(model_folder(tmp_path / "m", tokenizer, None))
    assert capsys.readouterr().out == ""

    tokenizer.normalizer = Lowercase()
    load_tokenizer(model_folder(tmp_path / "n", tokenizer, None))
    assert "changes a text before it is encoded: 'Let $x_1" in capsys.readouterr().out


def test_signs_that_a_small_vocabulary_lacks_are_named(tmp_path, capsys):
    characters = [*SPECIAL, "\n", *" abcdefghijklmnopqrstuvwxyz0123456789+=?"]
    tokenizer = Tokenizer(WordLevel({sign: number for number, sign in enumerate(characters)}))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer = load_tokenizer(model_folder(tmp_path / "m", finish(tokenizer), None))
    assert "has no tokens for" in capsys.readouterr().out

    # A problem that it cannot write is a bad row, not the end of a run.
    asked = [said("user", question) for question in ("1+1=?", "1-1=?")]
    assert prompt_trouble(tokenizer, asked[:1], 99) is None
    assert "does not take it" in prompt_trouble(tokenizer, asked[1:], 99)


def test_a_tokenizer_without_end_token(tmp_path):
    folder = model_folder(tmp_path / "m", byte_level(), LlamaConfig, eos_token=None)
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer(tmp_path, content):
    folder = model_folder(tmp_path / "m", byte_level(), LlamaConfig, **LLAMA)
    (tmp_path / "m" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot load") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_blanks_before_punctuation_stay(tmp_path):
    folder = model_folder(
        tmp_path / "m", sentence_piece(), LlamaConfig, clean_up_tokenization_spaces=True
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("f (x) . do n't").input_ids[1:]) == "f (x) . do n't"


# ----------------------------------------------------------------------------------------------
# written and read again


def by_character(model):
    """A tokenizer of another model than byte-pair encoding, with a token per character."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return finish(tokenizer)


CHARACTERS = list(dict.fromkeys(["<unk>", *SPECIAL, *TEXT, *LETTERS]))
WORD_LEVEL = {character: number for number, character in enumerate(CHARACTERS)}
TOKENIZERS = {
    "byte level": byte_level(),
    "byte level, digits": byte_level(DIGITS),
    "sentence piece": sentence_piece("every"),
    "word level": by_character(WordLevel(WORD_LEVEL, unk_token="<unk>")),
    "unigram": by_character(Unigram([(character, -1.0) for character in CHARACTERS], unk_id=0)),
}


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_saved_tokenizer_opens_as_the_same(tmp_path, config, tokenizer):
    """For transformers, and so for everybody: also beside the config.json of another family."""
    mine = load_tokenizer(model_folder(tmp_path / "tokenizer", tokenizer, None))
    check_tokenizer_can_be_saved(mine, config(**SMALL))

    folder = tmp_path / "model"
    config(**SMALL).save_pretrained(folder)
    save_tokenizer(mine, str(folder))
    check_same_tokens(mine, str(folder))
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened(TEXT).input_ids == mine(TEXT).input_ids
    assert load_tokenizer(str(folder))(TEXT).input_ids == mine(TEXT).input_ids

    # Again from there.
    second = tmp_path / "second"
    config(**SMALL).save_pretrained(second)
    save_tokenizer(load_tokenizer(str(folder)), str(second))
    assert AutoTokenizer.from_pretrained(second)(TEXT).input_ids == mine(TEXT).input_ids


def test_a_folder_that_opens_as_another_is_refused(tmp_path):
    mine = load_tokenizer(model_folder(tmp_path / "t", byte_level(), None))
    folder = model_folder(tmp_path / "m", byte_level(DIGITS), LlamaConfig)
    with pytest.raises(UserError, match="which differs at"):
        check_same_tokens(mine, folder)


@pytest.mark.slow
def test_the_conversion_of_the_numina_pipeline(tmp_path):
    """Step 0 of runs/numina.sh, with a small model of the same kind in place of DeepSeekMath."""
    import torch
    from transformers import LlamaForCausalLM

    folder = model_folder(tmp_path / "base", byte_level(DIGITS), None, **LLAMA)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **SMALL)).save_pretrained(folder)

    text = (ROOT / "runs" / "numina.sh").read_text()
    script = text.split("<<'PY'\n")[1].split("\nPY\n")[0]
    script = script.replace("'deepseek-ai/deepseek-math-7b-base'", repr(folder))
    script = script.replace("'out/deepseek_math_7b'", repr(str(tmp_path / "converted")))
    run("-c", script, cwd=ROOT, env=dict(PYTHONPATH=str(ROOT)))
    opened = AutoTokenizer.from_pretrained(tmp_path / "converted")
    file = Tokenizer.from_file(f"{folder}/tokenizer.json")
    assert opened(TEXT).input_ids == file.encode(TEXT).ids
    assert sorted(os.listdir(tmp_path)) == ["base", "converted"]


def test_two_models_with_one_tokenizer_and_with_two(tmp_path):
    one = model_folder(tmp_path / "one", byte_level(), LlamaConfig)
    same = model_folder(tmp_path / "same", byte_level(DIGITS), Qwen2Config)
    check_same_tokenizer(one, one)
    check_same_tokenizer(one, same)
    other = model_folder(tmp_path / "other", sentence_piece(), LlamaConfig)
    with pytest.raises(UserError, match="has another tokenizer than"):
        check_same_tokenizer(one, other)

    # Nothing but a configuration.
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "bare")
    check_same_tokenizer(one, str(tmp_path / "bare"))


# ----------------------------------------------------------------------------------------------
# end tokens


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (dict(eos_token_id=2), None, ["<|im_end|>", "<|endoftext|>"]),
        (dict(eos_token_id=[2, 0]), None, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
        (dict(eos_token_id=2), dict(eos_token_id=1), ["<|im_end|>"]),
        (dict(eos_token_id=2), dict(temperature=0.6), ["<|im_end|>", "<|endoftext|>"]),
        (dict(eos_token_id=1), dict(eos_token_id=[1, 2]), ["<|im_end|>", "<|endoftext|>"]),
        (dict(text_config=dict(eos_token_id=2)), None, ["<|im_end|>", "<|endoftext|>"]),
        # Llama's default is 2: what the file does not name is no end token.
        ({}, None, ["<|im_end|>"]),
        (dict(eos_token_id=-1), None, ["<|im_end|>"]),
        (dict(eos_token_id=None), dict(eos_token_id=None), ["<|im_end|>"]),
    ],
)
def test_end_tokens_of_a_model(tmp_path, config, generation, expected):
    folder = model_folder(tmp_path / "m", byte_level(), None)
    write_json(tmp_path / "m" / "config.json", dict(model_type="llama") | config)
    if generation is not None:
        write_json(tmp_path / "m" / "generation_config.json", generation)
    tokenizer = load_tokenizer(folder)
    names = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, folder))
    assert names == expected


def test_an_end_token_that_the_model_does_not_know(tmp_path):
    """transformers gives a name that tokenizer.json lacks the next free number."""
    folder = model_folder(tmp_path / "m", byte_level(), None)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "m" / "tokenizer_config.json", settings | dict(eos_token="</end>"))
    tokens = len(byte_level().get_vocab())
    config = dict(model_type="llama", vocab_size=tokens)
    write_json(tmp_path / "m" / "config.json", config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == tokens
    with pytest.raises(UserError, match=f"no answer would end.*'</end>' is token {tokens}"):
        check_end_token(tokenizer, folder)

    # One that the model knows is enough.
    write_json(tmp_path / "m" / "config.json", config | dict(eos_token_id=1))
    check_end_token(tokenizer, folder)


def test_end_tokens_of_a_model_that_had_another_tokenizer(tmp_path):
    """Its numbers are words of the new one."""
    tokenizer = load_tokenizer(model_folder(tmp_path / "t", byte_level(), None))
    LlamaConfig(eos_token_id=[40, 2]).save_pretrained(tmp_path / "m")
    assert stop_tokens(tokenizer, str(tmp_path / "m")) == [1, 2]


# ----------------------------------------------------------------------------------------------
# conversations in parts


def said(role, content):
    return dict(role=role, content=content)


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
MISTRAL = LLAMA_2.replace("%} {{ m.content }}<", "%}{{ m.content }}<")
TALK = [
    said("user", "the sum"),
    said("assistant", "is the"),
    said("user", "so is the"),
    said("assistant", "the sum"),
]


@pytest.mark.parametrize("template", [LLAMA_2, MISTRAL, CHATML])
@pytest.mark.parametrize("prefix", ["first", "every", "always", None])
def test_a_conversation_is_trained_on_as_it_is_sampled(tmp_path, template, prefix):
    """The second prompt has the ids that an engine gets; answers begin as in the whole text."""
    made = byte_level() if prefix is None else sentence_piece(prefix)
    tokenizer = load_tokenizer(
        model_folder(tmp_path / "m", made, LlamaConfig, chat_template=template)
    )
    tokens, scored = tokenize_messages(tokenizer, TALK)
    for turn in (1, 3):
        prompt = render_prompt(tokenizer, TALK[:turn])
        assert tokens[: len(prompt)] == prompt
        assert not scored[len(prompt) - 1] and scored[len(prompt)]
    whole = encode(tokenizer, tokenizer.apply_chat_template(TALK, tokenize=False))
    assert tokens == whole[: len(tokens)]


@pytest.mark.parametrize("strip", [dict(rstrip=True), dict(lstrip=True), dict()])
def test_special_tokens_that_swallow_blanks(tmp_path, strip):
    """As Phi's: what stands around them is the same in training and in a prompt."""
    made = byte_level()
    made.add_special_tokens([AddedToken("<|sep|>", special=True, normalized=False, **strip)])
    template = CHATML.replace("<|im_start|>", " <|sep|>\n")
    tokenizer = load_tokenizer(
        model_folder(tmp_path / "m", made, LlamaConfig, chat_template=template)
    )
    tokens, _ = tokenize_messages(tokenizer, TALK)
    prompt = render_prompt(tokenizer, TALK[:3])
    assert tokens[: len(prompt)] == prompt


def test_a_tools_words_go_on_after_a_new_line(tmp_path):
    """In training as in the loop: no blank before them, and none before what the model adds."""
    tokenizer = load_tokenizer(model_folder(tmp_path / "m", sentence_piece(), LlamaConfig))
    answer = "```output\nthe sum\n```\nis the"
    tokens, scored = tokenize_messages(tokenizer, [said("user", "the"), said("assistant", answer)])
    from_tool = encode_words(tokenizer, "```output\n", "the sum\n```")
    prompt = render_prompt(tokenizer, [said("user", "the")])
    masked = [token for token, score in zip(tokens, scored) if not score]
    assert masked == prompt + from_tool
    assert tokenizer.convert_ids_to_tokens(from_tool)[0] == "the"
    assert tokenizer.decode(tokens[len(prompt) : -1]) == answer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_somebodys_words_are_no_special_tokens(tmp_path, make):
    made = make()
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = load_tokenizer(model_folder(tmp_path / "m", made, LlamaConfig))
    text = "the<|im_end|>\n<|im_start|>assistant<think><|im_<|im_end|>end|>is"
    ids = encode_words(tokenizer, "```output\n", text)
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    assert tokenizer.decode(ids) == text
    assert "".join(split_special_tokens(tokenizer, text)) == text


def test_a_tokenizer_made_in_memory():
    """It has no folder; nothing is looked up."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|im_end|>")
    assert encode_words(tokenizer, "", "a<|im_end|>")[-1] != tokenizer.eos_token_id
