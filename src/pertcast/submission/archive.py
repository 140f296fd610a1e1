"""The season's archive, byte by byte: an uncompressed tar of a zstd-compressed h5ad and a watermark.

Invariants: equal h5ad files give equal archives (no clock, user or thread count in the bytes); nothing is believed that
is read: names, kinds and sizes of members are checked before a byte of them is written. Memory does not grow with size.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import zstandard

from pertcast.errors import SubmissionError
from pertcast.progress import Advance, Progress
from pertcast.seasons import SEASONS, Season

__all__ = ["DEFAULT_LEVEL", "extract_archive", "write_archive"]

DEFAULT_LEVEL = 3
_SUFFIX = ".zst"
_WATERMARK = "watermark.txt"
_META = "meta.json"
_READ_BYTES = 1 << 22
# One zstd block of 4 bytes may stand for 128 KiB, so this bounds what one call can unfold to 256 MiB.
_FEED_BYTES = 1 << 13
_BYTES_PER_VALUE = 16
_SLACK_BYTES = 1 << 30
_DAMAGED = "copy or download it again, or pack the prediction again"


def write_archive(
    source: Path, archive: Path, *, season: Season, level: int, progress: Progress, meta: bytes | None = None
) -> None:
    """Write the archive of an h5ad file, read it back, and compare it with the file.

    Parameters
    ----------
    source
        The h5ad file, as it is to be packed.
    archive
        Where to write; give a temporary name.
    season
        Its members and watermark.
    level
        zstd's level.
    meta
        Content of ``meta.json``, where the season's archive has one.

    Raises
    ------
    SubmissionError
        If what was read back is not what was written.
    """
    total = source.stat().st_size
    with archive.open("w+b") as stream:
        for name in season.members:
            start = stream.tell()
            stream.write(bytes(tarfile.BLOCKSIZE))
            if name.endswith(_SUFFIX):
                with progress.task("pack", total, "B") as advance:
                    digest = hashlib.sha256()
                    compressor = zstandard.ZstdCompressor(
                        level=level, threads=max(1, os.cpu_count() or 1), write_checksum=True
                    )
                    with (
                        source.open("rb") as reading,
                        compressor.stream_writer(stream, size=total, closefd=False) as writer,
                    ):
                        while chunk := reading.read(_READ_BYTES):
                            digest.update(chunk)
                            writer.write(chunk)
                            advance(len(chunk))
            else:
                stream.write(_content(season, name, meta))
            _close_member(stream, name, start)
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))
    with progress.task("read back", archive.stat().st_size, "B") as advance:
        again = hashlib.sha256()
        for chunk in _read_archive(archive, advance, max_bytes=total):
            again.update(chunk)
    if again.digest() != digest.digest():
        raise SubmissionError(f"{archive}: what was read back is not what was written; check the disk, then pack again")


def _content(season: Season, name: str, meta: bytes | None) -> bytes:
    if name == _META and meta is not None:
        return meta
    if name == _WATERMARK and season.watermark is not None:
        return season.watermark.encode()
    raise SubmissionError(f"season {season.name}: this version of pertcast cannot write the member {name!r}; update it")


def _close_member(stream: IO[bytes], name: str, start: int) -> None:
    """Write the header of the member that ends here, into the block that was left free for it."""
    end = stream.tell()
    header = tarfile.TarInfo(name)
    header.size = end - start - tarfile.BLOCKSIZE
    header.mode = 0o644
    stream.seek(start)
    stream.write(header.tobuf(format=tarfile.GNU_FORMAT))
    stream.seek(end)
    stream.write(bytes(-end % tarfile.BLOCKSIZE))


def extract_archive(archive: Path, out: Path, *, progress: Progress) -> None:
    """Write the h5ad of an archive to `out`, a temporary name.

    Raises
    ------
    SubmissionError
        If it is no archive of a season, is truncated or damaged, or unfolds to more than a season allows.
    """
    total = archive.stat().st_size if archive.is_file() else 0
    with progress.task("unpack", total, "B") as advance, out.open("wb") as stream:
        for chunk in _read_archive(archive, advance):
            stream.write(chunk)


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


def _read_archive(archive: Path, advance: Advance, *, max_bytes: int | None = None) -> Iterator[bytes]:
    """Check all members, then yield the bytes of the h5ad in bounded pieces; `advance` is told what was read."""
    if not archive.is_file():
        what = "a folder, not a file" if archive.is_dir() else "no such file"
        raise SubmissionError(f"{archive}: {what}; give the path of a .vcc file")
    most = 1 + max(len(season.members) for season in SEASONS.values())
    with _reading(archive), tarfile.open(archive, "r:") as tar:
        members: list[tarfile.TarInfo] = []
        while len(members) < most and (member := tar.next()) is not None:
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
            if name.endswith(_SUFFIX):
                limit = _max_bytes(season) if max_bytes is None else max_bytes
                yield from _decompressed(archive, stream, advance, limit=limit)
            elif name == _WATERMARK and season.watermark is not None:
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
