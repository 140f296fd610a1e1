"""Write and read the season's archive: an uncompressed tar of a zstd-compressed h5ad and a watermark.

Invariants: names, kinds and sizes of members are checked before a byte of them is written. Equal h5ad files give equal
archives (no clock, user or thread count in the bytes). Memory does not grow with size. A written archive is read back
and compared.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import zstandard

from pertcast.errors import SubmissionError
from pertcast.files.artefacts import hash_file
from pertcast.files.resources import available_cpus, require_space
from pertcast.progress import Advance, Progress
from pertcast.seasons import SEASONS, Season

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
    """Write the h5ad of an archive to `out`, a temporary name."""
    total = archive.stat().st_size if archive.is_file() else 0
    require_space(out, _unfolded_bytes(archive) or total, what="the h5ad")
    with progress.task("unpack", total, "B") as advance, out.open("wb") as stream:
        for chunk in read_archive(archive, advance):
            stream.write(chunk)


def _unfolded_bytes(archive: Path) -> int | None:
    """Return the declared size of the h5ad, if any; only the disk check uses it."""
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
    """Return a bound on the size of any valid h5ad of the season."""
    values = season.max_stored_values or season.max_cells * season.num_genes
    return values * _BYTES_PER_VALUE + _SLACK_BYTES


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turn the errors of tarfile and zstandard on a damaged archive into one error."""
    try:
        yield
    except zstandard.ZstdError as error:
        raise SubmissionError(f"{archive}: the compressed h5ad is damaged ({error}); {_DAMAGED}") from error
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise SubmissionError(f"{archive}: not a complete tar archive ({error}); {_DAMAGED}") from error


def read_archive(archive: Path, advance: Advance, *, max_bytes: int | None = None) -> Iterator[bytes]:
    """Check all members, then yield the bytes of the h5ad in bounded pieces."""
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
    """Yield the bytes of all zstd frames; a truncated frame or too many bytes are errors."""
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
    """Write the archive of an h5ad file, read it back, and compare it with the file."""
    total = source.stat().st_size
    with archive.open("w+b") as stream:
        for name in season.members:
            start = stream.tell()
            stream.write(bytes(tarfile.BLOCKSIZE))
            if name.endswith(COMPRESSED):
                digest, check_sum = _compress(source, total, stream, level=level, progress=progress)
            else:
                stream.write(_content(season, name, meta))
            # write the header of the member that ends here, into the block that was left free for it
            end = stream.tell()
            header = tarfile.TarInfo(name)
            header.size = end - start - tarfile.BLOCKSIZE
            header.mode = 0o644
            stream.seek(start)
            stream.write(header.tobuf(format=tarfile.GNU_FORMAT))
            stream.seek(end)
            stream.write(bytes(-end % tarfile.BLOCKSIZE))
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))
    # unpack the archive again; zstd's check sum, ours and the length must match
    done, again = 0, 0
    with progress.task("read back", archive.stat().st_size, "B") as advance:
        for chunk in read_archive(archive, advance, max_bytes=total):
            again = zlib.crc32(chunk, again)
            done += len(chunk)
    if (done, again) != (total, check_sum):
        raise SubmissionError(f"{archive}: what was read back is not what was written; check the disk, then pack again")
    return Packed(digest, hash_file(archive))


def _compress(source: Path, total: int, stream: IO[bytes], *, level: int, progress: Progress) -> tuple[str, int]:
    """Compress a file into a stream; return its sha256 and CRC-32."""
    digest, check_sum, done = hashlib.sha256(), 0, 0
    workers = min(available_cpus(), _MAX_WORKERS)
    compressor = zstandard.ZstdCompressor(level=level, threads=workers, write_checksum=True)
    with progress.task("pack", total, "B") as advance, source.open("rb", buffering=0) as uncompressed:
        writer = compressor.stream_writer(stream, size=total, closefd=False)
        while chunk := uncompressed.read(min(_READ_BYTES, total - done)):
            digest.update(chunk)
            check_sum = zlib.crc32(chunk, check_sum)
            writer.write(chunk)
            done += len(chunk)
            advance(len(chunk))
        if done < total:
            raise SubmissionError(
                f"{source}: it became shorter while it was packed; stop other programs from writing it"
            )
        writer.close()  # type: ignore[no-untyped-call]
    return digest.hexdigest(), check_sum


def _content(season: Season, name: str, meta: bytes | None) -> bytes:
    if name == META and meta is not None:
        return meta
    if name == WATERMARK and season.watermark is not None:
        return season.watermark.encode()
    raise SubmissionError(f"season {season.name}: this version of pertcast cannot write the member {name!r}; update it")


def estimate_packed(source: Path, *, level: int) -> int:
    """Estimate the size of the archive of a file, from compressed samples."""
    total = source.stat().st_size
    compressor = zstandard.ZstdCompressor(level=level)
    read = packed = 0
    with source.open("rb", buffering=0) as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek(total * number // _NUM_SAMPLES)
            sample = stream.read(_SAMPLE_BYTES)
            read, packed = read + len(sample), packed + len(compressor.compress(sample))
    return int(total * packed / max(read, 1)) + tarfile.RECORDSIZE
