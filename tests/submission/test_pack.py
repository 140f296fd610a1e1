"""What is packed comes out again, equals what the official packer packs, and never from a prediction that is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from agreement_cases import draft_2026
from conftest import SMALL_GENES, write_small_h5ad
from pertcast.errors import DataError, SubmissionError
from pertcast.files.artefacts import read_manifest, verify_artefact
from pertcast.files.h5ad_writer import CsrWriter
from pertcast.progress import SILENT
from pertcast.seasons import SEASONS
from pertcast.seasons import season as season_of
from pertcast.submission import archive
from pertcast.submission import archive as stream
from pertcast.submission.pack import PackOptions, pack, unpack

RULES = {"num_genes": len(SMALL_GENES)}


@pytest.fixture
def genes(tmp_path: Path) -> Path:
    return write_genes(tmp_path / "gene_names.csv")


def write_genes(path: Path, names: tuple[str, ...] = SMALL_GENES) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def there_and_back(path: Path, genes: Path) -> ad.AnnData:
    vcc = pack(path, path.with_suffix(".vcc"), season=season_of("vcc2025", RULES), genes=genes)
    return ad.read_h5ad(unpack(vcc, path.with_name("back.h5ad")))


def official_twin(counts: np.ndarray) -> np.ndarray:
    """Median-normalise dense counts and take log1p, one cell at a time, in float64."""
    totals = counts.sum(1, dtype=np.float64)
    rows = [
        np.log1p(row * (np.median(totals) / total if total else 0)) for row, total in zip(counts, totals, strict=True)
    ]
    return np.array(rows)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_log1p_prediction_comes_back_slim_and_equal(tmp_path: Path, genes: Path, layout: str) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p", layout=layout)
    before, back = ad.read_h5ad(path), there_and_back(path, genes)
    values = before.X if layout == "dense" else before.X.toarray()
    assert np.array_equal(back.X.toarray(), values)
    assert sparse.isspmatrix_csr(back.X)
    assert back.X.dtype == np.float32
    assert list(back.obs) == ["target_gene"]
    assert back.obs["target_gene"].astype(str).tolist() == before.obs["target_gene"].astype(str).tolist()
    assert back.obs_names.tolist() == [str(i) for i in range(96)]
    assert back.var_names.tolist() == list(SMALL_GENES)
    assert back.var.shape[1] == 0


def test_counts_are_normalised_as_the_official_packer_does_and_this_is_noted(tmp_path: Path, genes: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad")
    cells = ad.read_h5ad(path)
    dense = cells.X.toarray()
    dense[5] = 0
    cells.X = sparse.csr_matrix(dense)
    cells.write_h5ad(path)
    back = there_and_back(path, genes)
    np.testing.assert_allclose(back.X.toarray(), official_twin(dense), rtol=1e-6)
    manifest = read_manifest(path.with_suffix(".vcc"), kind="submission")
    assert any("scaled to the median" in note for note in manifest.notes)
    assert manifest.facts["scale"] == "log1p"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2**32 - 1), st.sampled_from(["slim", "wide"])
)
def test_pack_then_unpack_is_the_identity(cells: int, num_genes: int, density: float, seed: int, form: str) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.gamma(1.0, 1.0, (cells, num_genes)) * (rng.random((cells, num_genes)) < density)).astype(np.float32)
    values[0, 0] = 0.5
    names = tuple(f"G{i}" for i in range(num_genes))
    labels = ["non-targeting", *rng.choice(["G0", "ä/ b"], cells - 1).tolist()]
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[str(i) for i in range(cells)])
    if form == "wide":
        obs["other"] = rng.random(cells)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with CsrWriter(folder / "p.h5ad", names) as writer:
            writer.append(sparse.csr_matrix(values))
            writer.finish(obs)
        genes = write_genes(folder / "genes.csv", names)
        rules = {"num_genes": num_genes}
        vcc = pack(folder / "p.h5ad", folder / "p.vcc", season=season_of("vcc2025", rules), genes=genes)
        out = unpack(vcc, folder / "back.h5ad")
        back = ad.read_h5ad(out)
        if form == "slim":
            assert out.read_bytes() == (folder / "p.h5ad").read_bytes()
    assert np.array_equal(back.X.toarray(), values)
    assert back.obs["target_gene"].tolist() == labels
    assert list(back.obs) == ["target_gene"]
    assert back.obs_names.tolist() == obs.index.tolist()
    assert back.var_names.tolist() == list(names)


def test_the_archive_is_the_seasons(tmp_path: Path, genes: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    vcc = pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    with tarfile.open(vcc, "r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == ["pred.h5ad.zst", "watermark.txt"]
        assert [(member.mode, member.mtime, member.uid, member.gid) for member in members] == [(0o644, 0, 0, 0)] * 2
        watermark, packed = tar.extractfile("watermark.txt"), tar.extractfile("pred.h5ad.zst")
        assert watermark is not None
        assert watermark.read() == b"vcc-prep"
        assert packed is not None
        whole = zstandard.ZstdDecompressor().decompress(packed.read())
    assert whole == unpack(vcc, tmp_path / "back.h5ad").read_bytes()


def test_equal_predictions_are_equal_bytes_and_packing_again_is_skipped(tmp_path: Path, genes: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    one = pack(path, tmp_path / "one.vcc", season=season_of("vcc2025", RULES), genes=genes)
    other = pack(path, tmp_path / "other.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert one.read_bytes() == other.read_bytes()
    before = one.stat().st_mtime_ns
    pack(path, one, season=season_of("vcc2025", RULES), genes=genes)
    assert one.stat().st_mtime_ns == before
    one.write_bytes(b"spoiled")
    with pytest.raises(DataError, match="was changed since"):
        pack(path, one, season=season_of("vcc2025", RULES), genes=genes)
    pack(path, one, season=season_of("vcc2025", RULES), genes=genes, options=PackOptions(force=True))
    assert one.read_bytes() == other.read_bytes()
    assert verify_artefact(one) == []


def test_another_bundle_of_lists_packs_again(tmp_path: Path) -> None:
    draft, folder = draft_2026(), tmp_path / "lists"
    draft.write(folder)

    def packed() -> Path:
        genes, targets = folder / "genes.csv", folder / "targets.csv"
        out = tmp_path / "p.vcc"
        return pack(folder / "p.h5ad", out, season=season_of("vcc2026", draft.limits), genes=genes, targets=targets)

    alone = read_manifest(packed()).inputs
    bundle = '{"contexts": ["A", "B", "C"], "panel_id": "p7"}'
    (folder / "manifest.json").write_text(bundle)
    assert read_manifest(packed()).inputs == alone | {"bundle": hashlib.sha256(bundle.encode()).hexdigest()}
    (folder / "manifest.json").write_text('{"contexts": ["X", "Y"]}')
    with pytest.raises(SubmissionError, match="not packed"):
        packed()


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "pred.h5ad"
    source.write_bytes(np.random.default_rng(0).integers(0, 40, 20_000_000, dtype=np.uint8).tobytes())
    archives = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(stream, "available_cpus", lambda threads=threads: threads)
        written = tmp_path / f"{threads}.vcc"
        stream.write_archive(source, written, season=SEASONS["vcc2025"], level=3, progress=SILENT)
        archives.append(written.read_bytes())
    assert archives[0] == archives[1] == archives[2]


def test_what_check_refuses_is_not_packed_and_nothing_is_left(tmp_path: Path, genes: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p", perts=("control", "G1"))
    with h5py.File(path, "r+") as file:
        file["X/data"][3] = np.nan
    with pytest.raises(SubmissionError) as caught:
        pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert len(caught.value.problems) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gene_names.csv", "p.h5ad"]


def test_an_archive_that_reads_back_otherwise_is_not_kept(
    tmp_path: Path, genes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    monkeypatch.setattr(archive, "read_archive", lambda *args, **options: iter([b"something else"]))
    with pytest.raises(SubmissionError, match="not what was written"):
        pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gene_names.csv", "p.h5ad"]


def test_outputs_that_cannot_be(tmp_path: Path, genes: Path) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    with pytest.raises(SubmissionError, match="would replace the prediction"):
        pack(path, path, season=season_of("vcc2025", RULES), genes=genes)
    with pytest.raises(SubmissionError, match="cannot be written"):
        pack(path, path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    vcc = pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    with pytest.raises(SubmissionError, match="would replace the archive"):
        unpack(vcc, vcc)
    with pytest.raises(SubmissionError, match="cannot be written"):
        unpack(vcc, path / "back.h5ad")


Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = kind
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(vcc: Path) -> Members:
    with tarfile.open(vcc) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def zipped(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


BAD_ARCHIVES: dict[str, tuple[Callable[[Path, Members], object], str]] = {
    "empty": (lambda path, _: path.write_bytes(b""), "not a complete tar archive"),
    "no tar": (lambda path, _: path.write_bytes(b"hello" * 1000), "not a complete tar archive"),
    "gzipped": (lambda path, m: tarfile.open(path, "w:gz").close(), "not a complete tar archive"),
    "cut in the h5ad": (
        lambda path, m: path.write_bytes(write_tar(path, m).read_bytes()[:1500]),
        "not a complete tar|expected the members",
    ),
    "no watermark": (lambda path, m: write_tar(path, m[:1]), "expected the members of a season"),
    "another watermark": (
        lambda path, m: write_tar(path, [m[0], ("watermark.txt", b"other")]),
        "expected 'vcc-prep', got b'other'",
    ),
    "a longer watermark": (
        lambda path, m: write_tar(path, [m[0], ("watermark.txt", b"vcc-prep\n")]),
        "expected 'vcc-prep'",
    ),
    "one member more": (lambda path, m: write_tar(path, [*m, ("more.txt", b"x")]), "expected the members"),
    "many members": (lambda path, m: write_tar(path, [(str(i), b"") for i in range(1000)]), "expected the members"),
    "a member twice": (lambda path, m: write_tar(path, [m[0], m[1], m[1]]), "expected the members"),
    "a path upwards": (lambda path, m: write_tar(path, [("../pred.h5ad.zst", m[0][1]), m[1]]), "expected the members"),
    "an absolute path": (lambda path, m: write_tar(path, [("/pred.h5ad.zst", m[0][1]), m[1]]), "expected the members"),
    "links": (
        lambda path, m: write_tar(path, [(name, b"") for name, _ in m], kind=tarfile.SYMTYPE),
        "is no plain file",
    ),
    "hard links": (
        lambda path, m: write_tar(path, [(name, b"") for name, _ in m], kind=tarfile.LNKTYPE),
        "is no plain file",
    ),
    "devices": (
        lambda path, m: write_tar(path, [(name, b"") for name, _ in m], kind=tarfile.CHRTYPE),
        "is no plain file",
    ),
    "not compressed": (lambda path, m: write_tar(path, [("pred.h5ad.zst", b"\x89HDF" * 99), m[1]]), "is damaged"),
    "a frame cut": (lambda path, m: write_tar(path, [("pred.h5ad.zst", m[0][1][:-9]), m[1]]), "ends early|is damaged"),
    "an empty h5ad": (lambda path, m: write_tar(path, [("pred.h5ad.zst", b""), m[1]]), "ends early"),
    "no h5ad": (lambda path, m: write_tar(path, [("pred.h5ad.zst", zipped(b"hello" * 99)), m[1]]), "is no h5ad file"),
    "bits flipped": (
        lambda path, m: write_tar(path, [("pred.h5ad.zst", m[0][1][:900] + bytes(9) + m[0][1][909:]), m[1]]),
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_archives_that_are_not_unpacked(tmp_path: Path, genes: Path, name: str) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    members = members_of(pack(path, tmp_path / "good.vcc", season=season_of("vcc2025", RULES), genes=genes))
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad" / "bad.vcc"
    make, message = BAD_ARCHIVES[name]
    make(bad, members)
    with pytest.raises(SubmissionError, match=message):
        unpack(bad, tmp_path / "bad" / "out.h5ad")
    assert [file.name for file in (tmp_path / "bad").iterdir()] == ["bad.vcc"]


def test_an_archive_that_unfolds_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_max_bytes", lambda season: 10_000_000)
    bomb = write_tar(tmp_path / "b.vcc", [("pred.h5ad.zst", zipped(bytes(50_000_000))), ("watermark.txt", b"vcc-prep")])
    with pytest.raises(SubmissionError, match="unfolds to more than 10,000,000 bytes"):
        unpack(bomb, tmp_path / "out.h5ad")


def test_missing_archives(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="no such file"):
        unpack(tmp_path / "nowhere.vcc", tmp_path / "out.h5ad")
    with pytest.raises(SubmissionError, match="a folder, not a file"):
        unpack(tmp_path, tmp_path / "out.h5ad")


@pytest.mark.parametrize("cut", [100, 511, 512, 600, 3000, -11_000])
def test_archives_cut_anywhere(tmp_path: Path, genes: Path, cut: int) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p")
    vcc = pack(path, tmp_path / "p.vcc", season=season_of("vcc2025", RULES), genes=genes)
    vcc.write_bytes(vcc.read_bytes()[:cut])
    with pytest.raises(SubmissionError):
        unpack(vcc, tmp_path / "out.h5ad")


@pytest.mark.parametrize("several", [False, True])
def test_archives_of_others_are_unpacked(tmp_path: Path, genes: Path, several: bool) -> None:
    content = write_small_h5ad(tmp_path / "p.h5ad", scale="log1p").read_bytes()
    pieces = [content[:5000], content[5000:]] if several else [content]
    members = [("watermark.txt", b"vcc-prep"), ("pred.h5ad.zst", b"".join(map(zipped, pieces)))]
    assert unpack(write_tar(tmp_path / "o.vcc", members), tmp_path / "out.h5ad").read_bytes() == content


@pytest.mark.skipif(importlib.util.find_spec("cell_eval") is None, reason="needs the extra pertcast[score]")
@pytest.mark.skipif(shutil.which("zstd") is None, reason="the official packer needs the zstd program")
@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("scale", ["log1p", "counts"])
def test_it_equals_what_the_official_packer_packs(tmp_path: Path, genes: Path, layout: str, scale: str) -> None:
    path = write_small_h5ad(tmp_path / "p.h5ad", scale=scale, layout=layout)
    official = tmp_path / "official.vcc"
    arguments = ["prep", "-i", path, "-g", genes, "-o", official, "--expected-gene-dim", len(SMALL_GENES)]
    program = "from cell_eval.__main__ import main; main()"
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True, capture_output=True)
    ours = pack(path, tmp_path / "ours.vcc", season=season_of("vcc2025", RULES), genes=genes)
    theirs_back, ours_back = (ad.read_h5ad(unpack(vcc, vcc.with_suffix(".h5ad"))) for vcc in (official, ours))
    assert theirs_back.shape == ours_back.shape
    assert theirs_back.var_names.tolist() == ours_back.var_names.tolist()
    pd.testing.assert_frame_equal(theirs_back.obs, ours_back.obs)
    if scale == "log1p":
        assert np.array_equal(theirs_back.X.toarray(), ours_back.X.toarray())
    else:
        # log1p may differ in its last bit between builds of NumPy.
        np.testing.assert_allclose(theirs_back.X.toarray(), ours_back.X.toarray(), rtol=3e-7)
