"""Models in llama.cpp's GGUF files: which file a name stands for, and why one can't be read. Transformers reads them."""

import re
from importlib.util import find_spec
from pathlib import Path

from rlhf.errors import UserError

SUFFIX, SPLIT_NAME = ".gguf", re.compile(r"-\d{5}-of-\d{5}$")


def gguf_file(name: str | Path) -> Path | None:
    """Return the GGUF file that a name stands for; None for hub ids and for folders of ordinary checkpoints.

    Args:
        name: such a file, or a folder with one and without `config.json`.

    Raises:
        UserError: no such file; several in the folder; a part of a split model; the package `gguf` is missing.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        files = [path]
        if not path.is_file():
            raise UserError(f"{name}: no such file.")
    elif path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    else:
        return None
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{name}: {len(files)} GGUF files ({names}); name the one that is meant.")
    if SPLIT_NAME.search(files[0].stem):
        raise UserError(
            f"{files[0]}: a part of a split model, which transformers can't read; join the parts with llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    if find_spec("gguf") is None:
        raise UserError(f"{files[0]}: reading a GGUF file needs the package gguf: pip install 'rlhf-pipeline[gguf]'.")
    return files[0]


def unreadable(error: Exception) -> str:
    """Return in one line why transformers could not read a GGUF file."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if "not supported" in first:
        return f"transformers can't read this file ({first}) Use the model's own checkpoint instead."
    if "magic" in first:
        return "not a GGUF file."
    return f"the GGUF file is cut off or damaged ({type(error).__name__}: {first}); copy it again."
