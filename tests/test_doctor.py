"""What the doctor says about this machine, and about others."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hftcore.backend import BACKENDS, why_not
from hftcore.bindings import doctor
from hftcore.bindings.cli.app import app


def test_the_report_is_json_with_a_reason_for_every_backend_that_is_missing():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["packages"]["torch"] == torch.__version__
    assert report["devices"][0]["kind"] == "cpu"
    assert report["chosen"]["cpu"] in BACKENDS
    for name in BACKENDS:
        assert report["backends"][name]["cpu"] == why_not(name, "cpu")
    assert report["backends"]["torch"]["cpu"] is None


def test_the_text_names_every_package_and_backend():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stderr
    for word in [*doctor.PACKAGES, *BACKENDS, "Python", "Embedded model"]:
        assert word in result.stdout


def test_what_is_missing_comes_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in ("peft", "triton") else "1.0")
    monkeypatch.setattr(doctor, "_embedded", lambda: {"present": False, "remedy": "pip install the-model"})
    monkeypatch.setattr(doctor, "why_not", lambda name, kind: "no compiler" if name == "native" else None)
    report = doctor.examine()
    text = doctor.render(report)
    for sentence in (
        'pip install "hftcore[peft]"',
        "pip install triton",
        "pip install the-model",
        "install a C++ compiler",
    ):
        assert any(sentence in advice for advice in report["advice"]), sentence
        assert sentence in text
    assert "native on cpu: no: no compiler" in text
    assert "peft (not installed)" in text
    assert report["simd"] is None


def test_a_machine_with_everything_needs_nothing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    monkeypatch.setattr(doctor, "_embedded", lambda: {"present": True, "remedy": ""})
    monkeypatch.setattr(doctor, "why_not", lambda name, kind: None)
    monkeypatch.setattr(doctor, "_simd", lambda: "avx512")
    monkeypatch.delenv("HFTCORE_BACKEND", raising=False)
    report = doctor.examine()
    assert report["advice"] == []
    assert doctor.render(report).endswith("Nothing is missing.")
    assert "instruction set of the native backend: avx512" in doctor.render(report)


@pytest.mark.parametrize(
    ("variable", "reason"), [("tpu", "HFTCORE_BACKEND must be one of"), ("triton", "was asked for, but")]
)
def test_a_wrong_choice_of_backend_is_reported_and_does_not_stop_the_report(monkeypatch, variable, reason):
    monkeypatch.setenv("HFTCORE_BACKEND", variable)
    why_not.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = doctor.examine()
    why_not.cache_clear()
    assert report["chosen"]["cpu"] is None
    assert reason in report["advice"][0]
    assert f"HFTCORE_BACKEND={variable}" in doctor.render(report)


def test_gpus_are_listed_with_their_memory(monkeypatch):
    facts = type("Facts", (), {"name": "Some GPU", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.delenv("HFTCORE_BACKEND", raising=False)
    report = doctor.examine()
    assert {"kind": "cuda", "name": "Some GPU", "index": 0, "memory": "80 GiB"} in report["devices"]
    assert "cuda: Some GPU (index 0, memory 80 GiB)" in doctor.render(report)
