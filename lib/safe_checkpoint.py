"""Read a checkpoint of torch.distributed.checkpoint if it is whole, and run nothing that is in it.

torch unpickles a checkpoint's .metadata, and the values beside the tensors, as they are: whoever
wrote the folder could have this process call any function. Here a name that is not one of the
classes below is refused. And torch notices a file that is too short, but not another bit in it:
checksums.json has the SHA-256 of every file.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

CHECKSUMS = "checksums.json"

# What torch's .metadata consist of, by module. The path is where the checkpoint was written.
CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for what torch does not write into .metadata."""

    def find_class(self, module: str, name: str):
        # A dotted name would be looked up inside of an allowed one.
        if name in CLASSES.get(module, ()):
            if module.startswith("pathlib"):
                return Path
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class SafeReader(dcp.FileSystemReader):
    """torch's reader of checkpoints in files, with metadata by MetadataUnpickler."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path, ".metadata"), "rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, no metadata")
        # Earlier versions of torch wrote none.
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(dcp.DefaultLoadPlanner):
    """torch's planner, which takes numbers and texts beside the tensors, and no objects."""

    def load_bytes(self, read_item, value) -> None:
        name = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[name], loaded)


def load_checkpoint_files(state: dict, path: str) -> None:
    """dcp.load(state, checkpoint_id=path), which fills `state`, without unpickling objects.

    Collective. Raises torch's CheckpointException if the checkpoint cannot be read or asks for
    something that no checkpoint needs.
    """
    dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner())


def metadata_trouble(path: str) -> str | None:
    """Why a checkpoint's .metadata cannot be read; None: it can. torch would print a traceback."""
    try:
        SafeReader(path).read_metadata()
        read_checksums(path)
    except Exception as error:
        # Bytes of anything can do anything to an unpickler.
        return f"{type(error).__name__}: {error}"
    return None


def names_in_checkpoint(path: str) -> set[str]:
    """The top-level names of what a checkpoint holds."""
    entries = SafeReader(path).read_metadata().state_dict_metadata
    return {entry.partition(".")[0] for entry in entries}


# ----------------------------------------------------------------------------------------------
# checksums


def checksums(folder: str, names: list[str]) -> dict[str, str]:
    """{name: SHA-256, or why it cannot be read} of files in a folder. Collective.

    Each process reads its share of the files.
    """
    mine = names[dist.get_rank() :: dist.get_world_size()]
    found = {name: checksum(os.path.join(folder, name)) for name in mine}
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, found)
    merged = {}
    for part in by_rank:
        merged.update(part)
    return merged


def checksum(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)


def write_checksums(folder: str, sums: dict[str, str]) -> None:
    Path(folder, CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))


def read_checksums(folder: str) -> dict[str, str]:
    """{name: SHA-256} as they were written; {} for a checkpoint of before there were any.

    Raises ValueError if that file is damaged.
    """
    path = Path(folder, CHECKSUMS)
    if not path.exists():
        return {}
    sums = json.loads(path.read_bytes())
    written = {file.name for file in Path(folder).glob("*.distcp")}
    if not isinstance(sums, dict) or not written <= sums.keys():
        raise ValueError(f"{CHECKSUMS} does not name all files")
    return sums


def damaged_file(folder: str, sums: dict[str, str]) -> str | None:
    """The first file whose checksum is not the one in `sums`; None: all are whole. Collective."""
    names = sorted(sums)
    found = checksums(folder, names)
    for name in names:
        if found[name] != sums[name]:
            return name
    return None
