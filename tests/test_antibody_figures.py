"""The command that makes docs/antibody_figures.md runs end to end, on a tiny model and synthetic data."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from letters import BareLetters
from tiny_models import one_thread, tiny_model, with_lora  # noqa: F401

from hftcore.bindings.datasets import Pair, Review
from hftcore.bindings.demo import data as demo_data
from hftcore.bindings.evaluation import suites

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "antibody_figures.py"
OPTIONS = [
    "--seeds",
    "0",
    "1",
    "--shares",
    "5",
    "--align-steps",
    "1",
    "--tune-steps",
    "1",
    "--samples",
    "2",
    "--asked",
    "2",
]

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    made = tiny_model("llama")
    made.config.max_position_embeddings = 256  # a refusal has a token a letter
    return made


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, where the embedded model, its adapter and the data are small."""
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location("antibody_figures", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    rows = {
        "advbench": [f"request {i}" for i in range(520)],
        "alpaca": [Pair(f"question {i}", f"answer {i}") for i in range(900)],
        "reviews": [Review(f"film {i}", (i % 9) - 4.0) for i in range(3000)],
    }
    for place in (demo_data, suites):
        monkeypatch.setattr(place, "load", rows.__getitem__)
    monkeypatch.setattr(module, "ADAPTERS", tmp_path)
    with_lora(model(), ["q_proj"]).save_pretrained(tmp_path / "aligned")
    monkeypatch.setattr(module.embedded, "load", lambda: (model(), BareLetters()))
    return module


def test_the_page_and_its_figures_are_made_and_a_second_run_goes_on_from_the_results(script, monkeypatch, tmp_path):
    results, docs = tmp_path / "results.json", tmp_path / "docs"
    command = ["antibody_figures.py", *OPTIONS, "--results", str(results), "--docs", str(docs)]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    page = (docs / "antibody_figures.md").read_text()
    for title in ("SFT", "Antibody", 'Antibody\'s weights, `attenuation="norm"`, 1 in 5'):
        assert f"| {title} | 0, 1 |" in page
    assert "Not every seed is finished" in page, "two seeds are too few"
    assert page.count("**") >= 2, "the runs are read"
    for figure in ("antibody_gradient_norms.png", "antibody_ratios.png"):
        assert (docs / "figures" / figure).read_bytes().startswith(b"\x89PNG")
        assert f"figures/{figure}" in page
    cells = json.loads(results.read_text())["seeds"]["0"]
    assert len(cells["SFT"]["norms"]["benign"]) == len(cells["Antibody/attenuated/5"]["r"]["harmful"]) == 2
    monkeypatch.setattr(script, "train", lambda *_, **__: pytest.fail("what is finished was run again"))
    script.main()
    assert (docs / "antibody_figures.md").read_text() == page
    monkeypatch.setattr(sys, "argv", [*command, "--samples", "3"])
    with pytest.raises(SystemExit):
        script.main()
