"""The weights in a model's folder: which files are read, what is in them, and whether they fit."""

import json
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from configurator import UserError
from lib.pretrained import as_value_error, model_config

# Kinds of models whose files have the weights under the names of transformers' layers.
KINDS = ("llama", "mistral", "olmo", "qwen2", "qwen3")

# The names that transformers looks for, in this order.
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Rows of a matrix that are compared at a time.
COMPARED_ROWS = 8192


def weight_files(folder: str) -> list[str]:
    """The safetensors files that transformers reads: one, or the shards that the index names.

    Others beside them, such as a backup or shards of an earlier save, are no part of the model.
    Raises UserError if there are none, if the index cannot be read, or a shard is missing.
    """
    one = Path(folder, ONE_FILE)
    if one.is_file():
        return [str(one)]
    index = Path(folder, INDEX)
    if not has_weights(folder):
        raise UserError(
            f"{folder} has no *.safetensors file that is a model: neither {ONE_FILE} nor {INDEX}. "
            "Convert it with from_pretrained(...).save_pretrained(folder)"
        )

    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [Path(folder, name) for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no index of weights ({error!r}): copy it again") from None
    for file in files:
        # Not is_file(), which raises OSError for a name that is too long.
        if not os.path.isfile(file):
            raise UserError(f"{file}, which {INDEX} names, is not there: copy the model again")
    return [str(file) for file in files]


def has_weights(path: str) -> bool:
    """Is this a folder with a model in safetensors files?"""
    return Path(path, ONE_FILE).is_file() or Path(path, INDEX).is_file()


def open_weights(file: str):
    """An open safetensors file. Raises UserError if it is none, or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again") from None


def weight_shapes(files: list[str]) -> dict[str, tuple[str, list[int]]]:
    """{name of a weight: (its file, its shape)}."""
    found = {}
    for file in files:
        with open_weights(file) as weights:
            names = weights.keys()
            for name in names:
                found[name] = (file, weights.get_slice(name).get_shape())
    return found


def names_of_integers(files: list[str]) -> list[str]:
    """The names of the weights that are no floating-point numbers."""
    names = []
    for file in files:
        with open_weights(file) as weights:
            every = weights.keys()
            for name in every:
                if weights.get_slice(name).get_dtype().startswith(("I", "U", "BOOL")):
                    names.append(name)
    return names


def check_fit(folder: str, files: list[str], shapes: dict[str, list[int]], tied: bool) -> None:
    """Raise UserError if the files are not the weights of a model with these names and shapes.

    They have to be floating point: integers are quantized weights, which mean others.

    tied: the head is the embedding matrix. The files may then have it a second time, if it is the
    same: transformers would otherwise keep both and vLLM drop one.
    """
    found = weight_shapes(files)
    integers = names_of_integers(files)
    if integers:
        raise UserError(
            f"{folder} has {len(integers)} weights that are integers, such as {integers[0]}, and "
            "its config.json has no quantization_config: take the model it was made from"
        )
    missing = [name for name in shapes if name not in found]
    if missing:
        unknown = [name for name in found if name not in shapes]
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(shapes)} weights that its config.json asks "
            f"for, such as {missing[0]}; {len(unknown)} of its weights have other names"
            + (f", such as {unknown[0]}" if unknown else "")
        )

    for name, shape in shapes.items():
        if list(shape) != found[name][1]:
            raise UserError(
                f"{folder}: {name} has the shape {found[name][1]}, its config.json makes it "
                f"{list(shape)}: they are not of the same model"
            )

    head = "lm_head.weight"
    if tied and head in found and not same_weights(found, head, "model.embed_tokens.weight"):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings=true, but {head} is another matrix "
            "than the embeddings. Set it to false there, or remove the head from the file"
        )


def same_weights(found: dict, name: str, other: str) -> bool:
    """Are two matrices of weight_shapes() equal?"""
    file, shape = found[name]
    other_file, other_shape = found[other]
    if shape != other_shape:
        return False
    with open_weights(file) as weights, open_weights(other_file) as others:
        one = weights.get_slice(name)
        two = others.get_slice(other)
        for first in range(0, shape[0], COMPARED_ROWS):
            rows = slice(first, first + COMPARED_ROWS)
            if not torch.equal(one[rows], two[rows]):
                return False
    return True


def weights_not_finite(folder: str) -> list[str]:
    """The names of a folder's weights that are not finite, which reads all of its files once.

    Raises UserError as weight_files() does.
    """
    bad = []
    for file in weight_files(folder):
        with open_weights(file) as weights:
            names = weights.keys()
            for name in names:
                tensor = weights.get_tensor(name)
                if tensor.dtype.itemsize == 1:
                    # Of 8 bits torch knows no isfinite().
                    tensor = tensor.float()
                if not tensor.isfinite().all():
                    bad.append(name)
    return bad


def check_model_folder(path: str, finite: bool = True) -> None:
    """Raise UserError if the weights in a model's folder are not those of its config.json.

    finite: also if one of them is not finite, which reads all of them. A hub id is not looked at,
    nor are weights in another format than safetensors.
    """
    if not has_weights(path):
        return
    config = model_config(path)
    if config.model_type in KINDS and not getattr(config, "quantization_config", None):
        check_fit(path, weight_files(path), shapes_by(path, config), config.tie_word_embeddings)
    bad = weights_not_finite(path) if finite else []
    if bad:
        raise UserError(
            f"{path} has {len(bad)} weights that are not finite, such as {bad[0]}: what trained it "
            "went wrong. Take another model, or train it again"
        )


def empty_model(path: str, config, **options) -> torch.nn.Module:
    """The model of a transformers configuration on the meta device: shapes and no memory.

    Raises UserError if transformers cannot make one of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        # A number or a name in config.json that its code does not expect.
        raise UserError(f"{path}: no model by its config.json: {as_value_error(error)}") from error


def shapes_by(path: str, config) -> dict[str, list[int]]:
    """{name: shape} of the weights of a model of this configuration, as its files have them."""
    weights = empty_model(path, config).state_dict()
    if config.tie_word_embeddings:
        # The head is the embedding matrix: the files need it once.
        del weights["lm_head.weight"]
    return {name: list(tensor.shape) for name, tensor in weights.items()}


class TheseFiles(FileSystem):
    """A file system whose folders contain certain files and no others."""

    def __init__(self, files: list[str]):
        self.files = files

    def ls(self, path) -> list[str]:
        return self.files


def read_files(weights: dict, folder: str, files: list[str]) -> None:
    """Fill tensors or shards, by name, from these files of a folder. Collective."""
    reader = dcp.HuggingFaceStorageReader(folder)
    reader.fs = TheseFiles(files)
    dcp.load(weights, storage_reader=reader)
