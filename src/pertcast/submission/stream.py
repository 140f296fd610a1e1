"""Writes the season's archive in one pass over an h5ad file: read, hash and compress, then read back and compare.

Invariants: equal h5ad files give equal archives (no clock, user or thread count in the bytes); memory does not grow
with size.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

from pertcast.errors import SubmissionError
from pertcast.files.artefacts import hash_file
from pertcast.files.cpus import available_cpus
from pertcast.progress import Progress
from pertcast.seasons import Season
from pertcast.submission import archive as reading

__all__ = ["DEFAULT_LEVEL", "LEVELS", "Packed", "estimate_packed", "write_archive"]

# 3 is what the official packers use; see benchmarks/results for the others
DEFAULT_LEVEL = 3
LEVELS = range(1, 20)
_READ_BYTES = 1 << 22
# each worker holds a few tens of MB; more of them would not fit the bound on memory
_MAX_WORKERS = 8
_NUM_SAMPLES = 8
_SAMPLE_BYTES = 1 << 19


class Packed(NamedTuple):
    """The sha256 of what was packed, and of the archive."""

    source: str
    archive: str


def write_archive(
    source: Path,
    archive: Path,
    *,
    season: Season,
    level: int = DEFAULT_LEVEL,
    meta: bytes | None = None,
    progress: Progress,
) -> Packed:
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
            if name.endswith(reading.COMPRESSED):
                digest, check_sum = _compress(source, total, stream, level=level, progress=progress)
            else:
                stream.write(_content(season, name, meta))
            _close_member(stream, name, start)
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))
    _read_back(archive, total, check_sum, progress)
    return Packed(digest, hash_file(archive))


def _compress(source: Path, total: int, stream: IO[bytes], *, level: int, progress: Progress) -> tuple[str, int]:
    """Compress a file into a stream; return its sha256 and CRC-32."""
    digest, check_sum, done = hashlib.sha256(), 0, 0
    workers = min(available_cpus(), _MAX_WORKERS)
    compressor = zstandard.ZstdCompressor(level=level, threads=workers, write_checksum=True)
    with (
        progress.task("pack", total, "B") as advance,
        source.open("rb", buffering=0) as uncompressed,
    ):
        writer = compressor.stream_writer(stream, size=total, closefd=False)
        while chunk := uncompressed.read(min(_READ_BYTES, total - done)):
            digest.update(chunk)
            check_sum = zlib.crc32(chunk, check_sum)
            writer.write(chunk)
            done += len(chunk)
            advance(len(chunk))
        if done < total:
            raise SubmissionError(f"{source}: it became shorter while it was packed; let no other program write it")
        writer.close()  # type: ignore[no-untyped-call]
    return digest.hexdigest(), check_sum


def _read_back(archive: Path, total: int, check_sum: int, progress: Progress) -> None:
    """Unfold the archive again; zstd's own check sum, ours and the length must be those of what went in."""
    done, again = 0, 0
    with progress.task("read back", archive.stat().st_size, "B") as advance:
        for chunk in reading.read_archive(archive, advance, max_bytes=total):
            again = zlib.crc32(chunk, again)
            done += len(chunk)
    if (done, again) != (total, check_sum):
        raise SubmissionError(f"{archive}: what was read back is not what was written; check the disk, then pack again")


def _content(season: Season, name: str, meta: bytes | None) -> bytes:
    if name == reading.META and meta is not None:
        return meta
    if name == reading.WATERMARK and season.watermark is not None:
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


def estimate_packed(source: Path, *, level: int) -> int:
    """Return about how many bytes the archive of a file will have: samples from all over it are compressed."""
    total = source.stat().st_size
    compressor = zstandard.ZstdCompressor(level=level)
    read = packed = 0
    with source.open("rb", buffering=0) as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek(total * number // _NUM_SAMPLES)
            sample = stream.read(_SAMPLE_BYTES)
            read, packed = read + len(sample), packed + len(compressor.compress(sample))
    return int(total * packed / max(read, 1)) + tarfile.RECORDSIZE
