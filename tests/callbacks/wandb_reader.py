"""Read an offline W&B run back: wandb 0.31 has no public reader of its own files.

A ``.wandb`` file is a header and LevelDB's log format: blocks of 32 KiB; records of checksum, length and type; the data
of a record is a protocol buffer, cut into pieces where it does not fit into a block.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
HEADER = struct.Struct("<4sHB")
PIECE = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Run:
    """What an offline run holds.

    Args:
        folder: of the run; media files lie below ``files``.
        history: one mapping of keys to values per logged step.
        summary: the last value of every key.
        config: the hyper-parameters.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def scalars(self, key: str) -> dict[int, float]:
        """Trainer step -> value."""
        return {int(row["trainer/global_step"]): row[key] for row in self.history if key in row}

    def media(self, value: dict[str, Any]) -> list[Path]:
        """The files that a logged image or table points to."""
        return [self.folder / "files" / name for name in value.get("filenames") or [value["path"]]]

    def table(self, key: str) -> dict[str, Any]:
        """Columns and data of a logged table."""
        (path,) = self.media(self.summary[key])
        return json.loads(path.read_text())


def records(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file, each checked against its checksum."""
    data = path.read_bytes()
    assert HEADER.unpack_from(data)[:2] == (b":W&B", 0xBEE1)
    position, whole = HEADER.size, b""
    while position + PIECE.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < PIECE.size:  # too little room for a record: the block ends in zeros
            position += left
            continue
        checksum, length, kind = PIECE.unpack_from(data, position)
        begin = position + PIECE.size
        piece = data[begin : begin + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        assert (kind in (FULL, FIRST)) == (whole == b"")
        whole, position = whole + piece, begin + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""


def unpacked(items: Any) -> dict[str, Any]:
    """The key-value pairs of a protocol buffer; what is nested there is nested here."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The first mapping updated by the second, mappings inside too."""
    both = {key: (one[key], other[key]) for key in one.keys() & other.keys()}
    inner = {key: joined(a, b) for key, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}
    return one | other | inner


def read(save_dir: Path) -> Run:
    """The only offline run under ``save_dir``."""
    (path,) = save_dir.glob("wandb/offline-run-*/run-*.wandb")
    run = Run(path.parent)
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        run.history += [unpacked(record.history.item)] if record.HasField("history") else []
        run.summary = joined(run.summary, unpacked(record.summary.update))
        run.config |= unpacked(record.config.update) | unpacked(record.run.config.update)
    return run
