"""A model of random weights with the tokenizer of the built-in world: what benchmarks run on."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

ROOT = Path(__file__).resolve().parent.parent


def make_model(
    folder,
    config_class: type[PreTrainedConfig],
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    groups: int,
):
    """Write folder/world and folder/model, print the model's size, return the tokenizer.

    config_class: Qwen2Config or LlamaConfig. groups: heads of keys and values.
    """
    sizes = ["web_solutions", "train_problems", "rl_problems", "test_problems"]
    settings = [f"--{name}=50" for name in sizes]
    prepare = [sys.executable, "data/arithmetic/prepare.py", "--web_val_solutions=10"]
    subprocess.run(
        [*prepare, f"--out_dir={folder}/world", *settings],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/world/init")

    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f} M parameters")
    return tokenizer
