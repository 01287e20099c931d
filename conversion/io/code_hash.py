"""Which code a stopped run was of: parts that other code finished are not taken over."""

import hashlib
from pathlib import Path

import conversion
import modeling_channel_merged


def code_hash() -> str:
    """SHA-256 of every file of this program, and of the model's."""
    digest = hashlib.sha256()
    for package in (conversion, modeling_channel_merged):
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
