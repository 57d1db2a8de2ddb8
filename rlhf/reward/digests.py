"""Digests of the files that make a reward model's scores: a probe reads a few rows of an embedding, damage can be in any."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf.files import file_digest

# Weights and tokenizer. The chat template has a digest of its own on the card, by its text and not by its file.
SCORING_FILES = (
    "*.safetensors",
    "*.model",
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def scoring_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of weights or tokenizer in a folder and below it, by its path in the folder."""
    files = sorted({file for pattern in SCORING_FILES for file in folder.rglob(pattern)})
    with ThreadPoolExecutor(4) as threads:  # hashing leaves the interpreter free: several shards are read at once
        return dict(
            zip((file.relative_to(folder).as_posix() for file in files), threads.map(file_digest, files), strict=True)
        )


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the names of the files that are not what they were when `scoring_digests` saw them, or are gone."""
    today = scoring_digests(folder) if digests else {}  # cards of earlier versions name no files
    return [name for name, sha256 in sorted(digests.items()) if today.get(name) != sha256]
