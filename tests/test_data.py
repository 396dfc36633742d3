"""Calibration texts: what is read, what is refused, and which tokens count."""

import json
import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hftcore import HftcoreError
from hftcore.bindings.data import Sample, load_samples, make_batches

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Every word is a token."""
    words = [
        "<unk>",
        "<pad>",
        "<eos>",
        "<user>",
        "<assistant>",
        "<system>",
        "<end>",
        "one",
        "two",
        "three",
        "four",
        "sure",
        "no",
    ]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def outcome(path):
    """What comes of reading a file, as text."""
    try:
        return repr(load_samples(path))
    except HftcoreError as error:
        return str(error)


def counted(batch, tokenizer, row=0):
    """The words whose label counts."""
    return tokenizer.convert_ids_to_tokens([label for label in batch["labels"][row].tolist() if label != -100])


def test_every_layout_of_columns_is_understood(tmp_path):
    turns = (("user", "one"), ("assistant", "two"))
    path = write(
        tmp_path / "d.jsonl",
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"prompt": "one", "completion": "two", "id": 7},
        {"prompt": [{"role": "user", "content": "one"}], "completion": [{"role": "assistant", "content": "two"}]},
        {"instruction": "one", "input": "", "output": "two"},
        b"",
        {"instruction": "one", "input": "three", "output": "two"},
        {"text": "one two"},
    )
    assert load_samples(path) == [
        *[Sample(turns=turns)] * 4,
        Sample(turns=turns, context="three"),
        Sample(text="one two"),
    ]


def test_a_text_file_has_one_sample_a_line(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes("\ufeffone two\r\n\n  three\n".encode())
    assert load_samples(path) == [Sample(text="one two"), Sample(text="three")]


def test_rows_in_memory_need_only_length_and_items():
    class Rows:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [{"text": "one"}, "two"][index]

    assert load_samples(Rows()) == [Sample(text="one"), Sample(text="two")]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=8))
def test_whatever_is_written_as_jsonl_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    lines = [json.dumps({"instruction": a, "input": b, "output": c}, ensure_ascii=False) for a, b, c in rows]
    path.write_bytes("\n".join(lines).encode())
    assert load_samples(path) == [Sample(turns=(("user", a), ("assistant", c)), context=b) for a, b, c in rows]


@settings(deadline=None, max_examples=200)
@given(line=st.binary(max_size=60).filter(lambda line: b"\n" not in line))
def test_a_stray_line_is_read_or_refused_by_number_and_nothing_else(tmp_path_factory, line):
    path = write(tmp_path_factory.mktemp("stray") / "d.jsonl", {"text": "one"}, line)
    assert re.search(r"\[Sample|d\.jsonl, line 2: ", outcome(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', r"line 2: not valid JSON"),
        (b"[" * 100_000, r"line 2: not valid JSON"),
        (b"\xff\xfe", r"line 2: not UTF-8"),
        (b"[1, 2]", r"line 2: a row must be an object .*got list"),
        (b"{}", r"line 2: .*got none"),
        (b'{"prompt": "one"}', r"line 2: .*got `prompt`"),
        (b'{"text": null}', r"line 2: `text` must be a string, got NoneType"),
        (b'{"messages": "hi"}', r"line 2: `messages` must be a list"),
        (b'{"messages": []}', r"line 2: `messages` must be a list"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', r"line 2: turn 0 of `messages`.*role"),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}', r"line 2: turn 0 of `messages`.*content"),
    ],
)
def test_a_malformed_line_is_refused_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", {"text": "one"}, line)
    with pytest.raises(HftcoreError, match=rf"d\.jsonl, {message}"):
        load_samples(path)


def test_other_sources_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(HftcoreError, match=r"empty\.jsonl holds no samples"):
        load_samples(tmp_path / "empty.jsonl")
    with pytest.raises(HftcoreError, match="existing file"):
        load_samples(tmp_path / "absent.jsonl")
    with pytest.raises(HftcoreError, match=r"\.jsonl or \.txt"):
        load_samples(tmp_path / "d.parquet")
    with pytest.raises(HftcoreError, match="data must be a file or have"):
        load_samples(iter(["one"]))
    with pytest.raises(HftcoreError, match=r"data\[1\]: `text` must be a string"):
        load_samples([{"text": "one"}, {"text": 2}])


def test_a_chat_template_is_used_and_only_the_assistant_counts():
    tokenizer = make_tokenizer(TEMPLATE)
    turns = (("system", "four"), ("user", "one"), ("assistant", "sure two"), ("user", "three"), ("assistant", "no"))
    (batch,) = make_batches([Sample(turns=turns)], tokenizer)
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert " ".join(words) == (
        "<system> four <end> <user> one <end> <assistant> sure two <end> <user> three <end> <assistant> no <end>"
    )
    assert counted(batch, tokenizer) == ["sure", "two", "<end>", "no", "<end>"]


def test_a_chat_may_start_with_the_assistant():
    tokenizer = make_tokenizer(TEMPLATE)
    (batch,) = make_batches([Sample(turns=(("assistant", "sure"), ("user", "one")))], tokenizer)
    assert counted(batch, tokenizer) == ["<assistant>", "sure", "<end>"]


def test_without_a_chat_template_alpacas_is_used():
    tokenizer = make_tokenizer()
    (batch,) = make_batches([Sample(turns=(("user", "one"), ("assistant", " two")))], tokenizer)
    assert counted(batch, tokenizer) == ["two", "<eos>"]
    assert "one" in tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("context", ["", "three"])
def test_alpacas_template_is_the_published_one(context):
    seen = []

    class Spy:
        chat_template = None
        eos_token = "</s>"
        eos_token_id = pad_token_id = 0
        is_fast = False

        def __call__(self, text, add_special_tokens=True):
            seen.append((text, add_special_tokens))
            return {"input_ids": [len(text)]}

    (batch,) = make_batches([Sample(turns=(("user", "one"), ("assistant", "two")), context=context)], Spy())
    paired = ", paired with an input that provides further context" if context else ""
    given_input = "### Input:\nthree\n\n" if context else ""
    assert "".join(text for text, _ in seen) == (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\none\n\n{given_input}### Response:two</s>"
    )
    assert [special for _, special in seen] == [True] + [False] * (len(seen) - 1)
    assert batch["labels"][0].tolist() == [-100] * (len(seen) - 1) + [len("two</s>")]


def test_plain_text_counts_everywhere_and_so_does_all():
    tokenizer = make_tokenizer(TEMPLATE)
    (plain,) = make_batches([Sample(text="one two")], tokenizer)
    assert counted(plain, tokenizer) == ["one", "two"]
    (chat,) = make_batches([Sample(turns=(("user", "one"), ("assistant", "two")))], tokenizer, response_labels=False)
    assert torch.equal(chat["labels"], chat["input_ids"])


def test_batches_keep_order_and_pad_right():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    samples = [Sample(text=text) for text in ("one", "one two three", "two", "four")]
    first, second = make_batches(samples, tokenizer, batch_size=2, num_samples=3)
    one, two, three, pad = tokenizer.convert_tokens_to_ids(["one", "two", "three", "<pad>"])
    assert first["input_ids"].tolist() == [[one, pad, pad], [one, two, three]]
    assert first["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert first["labels"].tolist() == [[one, -100, -100], [one, two, three]]
    assert second["input_ids"].tolist() == [[two]]
    assert tokenizer.padding_side == "left"


def test_what_is_too_long_loses_its_end():
    tokenizer = make_tokenizer()
    (batch,) = make_batches([Sample(text="one two three four"), Sample(text="four")], tokenizer, max_length=2)
    assert batch["input_ids"].tolist() == [
        tokenizer.convert_tokens_to_ids(words) for words in (["one", "two"], ["four", "<pad>"])
    ]
    assert batch["labels"].shape == (2, 2)


def test_a_sample_without_a_counted_token_is_skipped_and_said_so(caplog):
    tokenizer = make_tokenizer(TEMPLATE)
    long = Sample(turns=(("user", "one two three four"), ("assistant", "two")))
    short = Sample(turns=(("user", "one"), ("assistant", "two")))
    with caplog.at_level(logging.WARNING, "hftcore"):
        (batch,) = make_batches([short, long, Sample(text="")], tokenizer, max_length=6)
    assert batch["input_ids"].shape == (1, 6)
    assert "2 of 3 samples (the first is number 2) have no response token within max_length=6" in caplog.text
    with pytest.raises(HftcoreError, match=r"1 of 1 samples .* max_length=6; raise max_length"):
        make_batches([long], tokenizer, max_length=6)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "num_samples"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(HftcoreError, match=f"{name} must be at least 1, got 0"):
        make_batches([Sample(text="one")], make_tokenizer(), **{name: 0})
