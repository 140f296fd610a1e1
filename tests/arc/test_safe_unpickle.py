"""Files of a run folder are data: whatever else they name is refused by name, and does not happen."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pertcast.arc import read_arc_folder
from pertcast.arc.safe_unpickle import hash_contents, read_pickle, read_tensors
from pertcast.errors import CheckpointError

CONFIG = """
data:
  kwargs: {embed_key: X_hvg, output_space: gene, control_pert: non-targeting}
model:
  name: state
  kwargs: {hidden_dim: 4}
"""


class Malice:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


class QuietMalice(Malice):
    """The same through names that look harmless."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def write_folder(path: Path) -> None:
    """Write a folder with all the files that reading wants."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    (path / "var_dims.pkl").write_bytes(pickle.dumps({"gene_names": [np.str_("A"), "B"], "gene_dim": np.int64(2)}))
    torch.save({np.str_("A"): torch.eye(2)[0], "non-targeting": torch.eye(2)[1]}, path / "pert_onehot_map.pt")
    torch.save({"b2": torch.eye(2)[1], np.str_("b1"): torch.eye(2)[0]}, path / "batch_onehot_map.torch")
    (path / "cell_type_onehot_map.pkl").write_bytes(pickle.dumps({"H1": torch.eye(1)[0]}))
    saved = {"state_dict": OrderedDict(w=torch.ones(2)), "hyper_parameters": {"n": np.int64(3)}, "global_step": 7}
    torch.save(saved, path / "checkpoints" / "final.ckpt")


def test_an_honest_folder_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    folder = read_arc_folder(tmp_path)
    assert folder.gene_names == ("A", "B")
    assert list(folder.perts) == ["A", "non-targeting"]
    assert folder.batches == ("b1", "b2")
    assert folder.contexts == ("H1",)
    assert folder.options == {"hidden_dim": 4, "n": 3}
    assert folder.step == 7
    assert torch.equal(folder.weights["w"], torch.ones(2))


@pytest.mark.parametrize("malice", [Malice, QuietMalice])
@pytest.mark.parametrize("protocol", [0, 2, 4, "legacy"])
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/final.ckpt",
        "pert_onehot_map.pt",
        "batch_onehot_map.torch",
        "cell_type_onehot_map.pkl",
        "var_dims.pkl",
    ],
)
def test_a_malicious_file_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, name: str, protocol: int | str, malice: type[Malice]
) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    write_folder(run)
    bad = {"state_dict": {"w": torch.ones(2)}, "x": malice(victim)}
    if name.endswith(".pkl"):
        (run / name).write_bytes(pickle.dumps(bad, protocol=2 if protocol == "legacy" else int(protocol)))
    elif protocol == "legacy":
        torch.save(bad, run / name, _use_new_zipfile_serialization=False)
    else:
        torch.save(bad, run / name, pickle_protocol=max(int(protocol), 2))
    with pytest.raises(CheckpointError) as caught:
        read_arc_folder(run)
    message = str(caught.value)
    assert str(run / name) in message
    assert "refused" in message
    named = ("exec",) if malice is Malice else ("getattr", "pathlib")
    # torch does not read pickles of protocol 4 so far as to see a name
    is_named = any(
        f"it names {prefix}{text}" in message for text in named for prefix in ("", "builtins.", "__builtin__.")
    )
    assert is_named or (protocol == 4 and not name.endswith(".pkl"))
    assert not victim.exists()


def test_the_malicious_object_is_malicious(tmp_path: Path) -> None:
    for number, malice in enumerate((Malice, QuietMalice)):
        victim = tmp_path / str(number)
        pickle.loads(pickle.dumps(malice(victim)))
        assert victim.exists()


class LoadsTensors:
    """A pickled storage that is itself malicious: torch unpickles it within the outer file."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return (torch.storage._load_from_bytes, (self.content,))


def test_malice_within_a_pickled_tensor_is_refused(tmp_path: Path) -> None:
    victim, inner = tmp_path / "victim", io.BytesIO()
    torch.save(Malice(victim), inner)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(LoadsTensors(inner.getvalue())))
    with pytest.raises(CheckpointError, match="exec"):
        read_pickle(path)
    assert not victim.exists()


class Encodes:
    def __reduce__(self) -> tuple[Any, ...]:
        import _codecs

        return (_codecs.encode, ("text", "rot13"))


class ObjectScalar:
    def __reduce__(self) -> tuple[Any, ...]:
        return (np.dtype, ("O", False, True))


@pytest.mark.parametrize(("name", "value"), [("a.pkl", Encodes()), ("a.pkl", ObjectScalar()), ("a.pt", ObjectScalar())])
def test_what_is_listed_does_only_what_it_is_listed_for(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / name
    if name == "a.pt":
        torch.save({"a": value}, path)
    else:
        path.write_bytes(pickle.dumps({"a": value}))
    with pytest.raises(CheckpointError, match="refused"):
        (read_tensors if name == "a.pt" else read_pickle)(path)


@pytest.mark.parametrize("value", [np.str_("naïve"), np.int64(-3), np.float32(0.5), np.bool_(True), np.bytes_(b"ab")])
@pytest.mark.parametrize("name", ["a.pt", "a.pkl"])
def test_scalars_are_read_as_plain_values(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / name
    if name == "a.pt":
        torch.save({"a": value}, path)
        found = read_tensors(path)["a"]
    else:
        path.write_bytes(pickle.dumps({"a": value}))
        found = read_pickle(path)["a"]
    assert found == value
    assert type(found) is type(value.item())


def test_a_config_with_a_python_tag_is_refused(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    write_folder(run)
    tag = f'!!python/object/apply:os.system ["touch {victim}"]'
    (run / "config.yaml").write_text(CONFIG + f"extra: {tag}\n")
    with pytest.raises(CheckpointError, match=r"config.yaml: refused.*os.system"):
        read_arc_folder(run)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name", ["checkpoints/final.ckpt", "pert_onehot_map.pt", "batch_onehot_map.torch", "var_dims.pkl"]
)
@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.95])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, name: str, kept: float) -> None:
    write_folder(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=name):
        read_arc_folder(tmp_path)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_checkpoint_is_known_by_what_is_in_it(tmp_path: Path, is_archive: bool) -> None:
    def write(name: str, weight: float, moment: float) -> Path:
        saved = {"state_dict": {"w": torch.full((3,), weight)}, "optimizer": torch.full((3,), moment)}
        (tmp_path / name).mkdir()
        path = tmp_path / name / "final.ckpt"
        torch.save(saved, path, _use_new_zipfile_serialization=is_archive)
        return path

    one = write("one", 1.0, 2.0)
    assert hash_contents(one) == hash_contents(one)
    assert len({hash_contents(one), hash_contents(write("b", 1.5, 2.0)), hash_contents(write("c", 1.0, 2.5))}) == 3
    if is_archive:
        assert hash_contents(one) == hash_contents(write("same", 1.0, 2.0))
    # what nobody has looked at is still on the disk, where it can change
    weights = read_tensors(one)["state_dict"]["w"]
    content = one.read_bytes().replace(np.full(3, 1, np.float32).tobytes(), np.full(3, 7, np.float32).tobytes())
    with one.open("r+b") as stream:
        stream.write(content)
    assert weights.tolist() == [7.0 if is_archive else 1.0] * 3


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("constants.pkl", b"x")
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_tensors(tmp_path / "a.ckpt")


def test_what_is_missing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_arc_folder(tmp_path)
    assert len(caught.value.problems) == 4
    assert "--checkpoint" in str(caught.value)
