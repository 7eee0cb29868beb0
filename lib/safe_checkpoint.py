"""Read a checkpoint of torch.distributed.checkpoint without running anything that is in it.

torch unpickles a checkpoint's .metadata, and the values beside the tensors, as they are: whoever
wrote the folder could have this process call any function. Here a name that is not one of the
classes below is refused.
"""

import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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
    except Exception as error:
        # Bytes of anything can do anything to an unpickler.
        return f"{type(error).__name__}: {error}"
    return None


def names_in_checkpoint(path: str) -> set[str]:
    """The top-level names of what a checkpoint holds."""
    entries = SafeReader(path).read_metadata().state_dict_metadata
    return {entry.partition(".")[0] for entry in entries}
