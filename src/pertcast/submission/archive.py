"""The season's archive, byte by byte: an uncompressed tar of a zstd-compressed h5ad and a watermark.

Invariants: nothing is believed that is read: names, kinds and sizes of members are checked before a byte of them is
written. Memory does not grow with size. It is written by :mod:`pertcast.submission.stream`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import zstandard

from pertcast.errors import SubmissionError
from pertcast.files.space import require_space
from pertcast.progress import Advance, Progress
from pertcast.seasons import SEASONS, Season

__all__ = ["COMPRESSED", "META", "WATERMARK", "extract_archive", "read_archive"]

COMPRESSED = ".zst"
WATERMARK = "watermark.txt"
META = "meta.json"
# One zstd block of 4 bytes may stand for 128 KiB, so this bounds what one call can unfold to 256 MiB.
_FEED_BYTES = 1 << 13
_FRAME_HEADER_BYTES = 18
_BYTES_PER_VALUE = 16
_SLACK_BYTES = 1 << 30
_DAMAGED = "copy or download it again, or pack the prediction again"


def extract_archive(archive: Path, out: Path, *, progress: Progress) -> None:
    """Write the h5ad of an archive to `out`, a temporary name.

    Raises
    ------
    SubmissionError
        If it is no archive of a season, is truncated or damaged, or unfolds to more than a season allows.
    """
    total = archive.stat().st_size if archive.is_file() else 0
    require_space(out, _unfolded_bytes(archive) or total, what="the h5ad")
    with progress.task("unpack", total, "B") as advance, out.open("wb") as stream:
        for chunk in read_archive(archive, advance):
            stream.write(chunk)


def _unfolded_bytes(archive: Path) -> int | None:
    """Return how large the h5ad says it is, where it says so; nothing else relies on it."""
    if not archive.is_file():
        return None
    try:
        with tarfile.open(archive, "r:") as tar:
            for _ in range(_most_members()):
                member = tar.next()
                if member is None:
                    return None
                stream = tar.extractfile(member) if member.isreg() and member.name.endswith(COMPRESSED) else None
                if stream is not None:
                    size = zstandard.frame_content_size(stream.read(_FRAME_HEADER_BYTES))
                    return size if 0 <= size <= max(map(_max_bytes, SEASONS.values())) else None
    except (tarfile.TarError, zstandard.ZstdError, ValueError, OverflowError, EOFError):
        return None
    return None


def _most_members() -> int:
    return 1 + max(len(season.members) for season in SEASONS.values())


def _season_of(archive: Path, names: list[str]) -> Season:
    for season in SEASONS.values():
        if sorted(names) == sorted(season.members):
            return season
    known = "; ".join(f"{season.name}: {', '.join(season.members)}" for season in SEASONS.values())
    raise SubmissionError(
        f"{archive}: expected the members of a season ({known}), got {', '.join(map(repr, names)) or 'none'}; "
        "give a .vcc file as pertcast or the official packer writes it"
    )


def _max_bytes(season: Season) -> int:
    """Return more than any valid h5ad of the season has."""
    values = season.max_stored_values or season.max_cells * season.num_genes
    return values * _BYTES_PER_VALUE + _SLACK_BYTES


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turn what a damaged archive makes tarfile and zstandard raise into one error."""
    try:
        yield
    except zstandard.ZstdError as error:
        raise SubmissionError(f"{archive}: the compressed h5ad is damaged ({error}); {_DAMAGED}") from error
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise SubmissionError(f"{archive}: not a whole tar archive ({error}); {_DAMAGED}") from error


def read_archive(archive: Path, advance: Advance, *, max_bytes: int | None = None) -> Iterator[bytes]:
    """Check all members, then yield the bytes of the h5ad in bounded pieces; `advance` is told what was read."""
    if not archive.is_file():
        what = "a folder, not a file" if archive.is_dir() else "no such file"
        raise SubmissionError(f"{archive}: {what}; give the path of a .vcc file")
    with _reading(archive), tarfile.open(archive, "r:") as tar:
        members: list[tarfile.TarInfo] = []
        while len(members) < _most_members() and (member := tar.next()) is not None:
            members.append(member)
        season = _season_of(archive, [member.name for member in members])
        for member in members:
            if not member.isreg() or member.issparse():
                raise SubmissionError(f"{archive}: member {member.name!r} is no plain file; {_DAMAGED}")
        by_name = {member.name: member for member in members}
        for name in season.members:
            stream = tar.extractfile(by_name[name])
            if stream is None:
                raise SubmissionError(f"{archive}: member {name!r} cannot be read; {_DAMAGED}")
            if name.endswith(COMPRESSED):
                limit = _max_bytes(season) if max_bytes is None else max_bytes
                yield from _decompressed(archive, stream, advance, limit=limit)
            elif name == WATERMARK and season.watermark is not None:
                expected = season.watermark.encode()
                got = stream.read(len(expected) + 1)
                if got != expected or by_name[name].size != len(expected):
                    raise SubmissionError(f"{archive}, {name}: expected {season.watermark!r}, got {got!r}; {_DAMAGED}")


def _decompressed(archive: Path, stream: IO[bytes], advance: Advance, *, limit: int) -> Iterator[bytes]:
    """Yield the bytes of all zstd frames of a stream; a frame that ends early, or too many bytes, are errors."""
    whole, done, frame = False, 0, zstandard.ZstdDecompressor().decompressobj()
    left = b""
    while feed := left or stream.read(_FEED_BYTES):
        if whole:
            frame, whole = zstandard.ZstdDecompressor().decompressobj(), False
        piece = frame.decompress(feed)
        whole, left = frame.eof, frame.unused_data
        advance(len(feed) - len(left))
        done += len(piece)
        if done > limit:
            raise SubmissionError(
                f"{archive}: its h5ad unfolds to more than {limit:,} bytes, more than a valid one has; {_DAMAGED}"
            )
        if piece:
            yield piece
    if not whole:
        raise SubmissionError(f"{archive}: the compressed h5ad ends early, after {done:,} bytes; {_DAMAGED}")
