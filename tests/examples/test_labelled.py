"""Labelled texts: read, split without overlap, encoded."""

import csv
import itertools

import numpy as np
import pytest

from data import labelled, masking
from data.labelled import Examples, Labelled, LabelledTextOptions
from task import UserError

ROWS = [Labelled(f"Sentence {i} of many", "ab"[i % 2]) for i in range(400)]


def test_rotten_tomatoes():
    rows = labelled.load(LabelledTextOptions())
    assert len(rows) == 8_530
    assert sum(row.label == "1" for row in rows) == 4_265
    parts = labelled.split(rows)
    assert [len(part) for part in parts] == pytest.approx([6_824, 853, 853], rel=0.05)
    texts = [{" ".join(row.text.lower().split()) for row in part} for part in parts]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 8_530


def test_a_text_stays_in_its_part_whatever_its_case_and_spaces():
    parts = labelled.split(ROWS)
    assert sorted(itertools.chain(*parts)) == sorted(ROWS)
    shouted = [Labelled(row.text.upper().replace(" ", "  "), "c") for row in ROWS[:50]]
    for part, more in zip(parts, labelled.split([*ROWS, *shouted]), strict=True):
        texts = {row.text for row in part}
        for row in more:
            assert " ".join(row.text.capitalize().split()) in texts


def test_csv(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('label,text\nx,"One,\ntwo"\ny,Three\nx,three \n')
    rows = labelled.load(LabelledTextOptions(csv=str(path)))
    assert rows == [Labelled("One,\ntwo", "x"), Labelled("Three", "y")]


def test_csv_of_a_spreadsheet_with_long_texts_and_many_labels(tmp_path):
    path = tmp_path / "mine.csv"
    limit = csv.field_size_limit()
    lines = [f"{'x' * 200_000} {i},label {i}" for i in range(2)]
    lines += [f"text {i},label {i % 20_000}" for i in range(40_000)]
    path.write_text("\n".join(["text,label", *lines]), encoding="utf-8-sig")
    rows = labelled.load(LabelledTextOptions(csv=str(path)))
    assert len(rows) == 40_002
    assert labelled.frequency_loss(rows, rows) == pytest.approx(np.log(20_000), abs=0.1)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\nOne,"x\n', r"line \d: unexpected end of data"),
        ("", "no column label or text in it"),
        ("text\nOne\n", "no column label in it"),
        ("text,label\nOne,x\n,y\n", "line 3 has no text or label"),
        ("text,label\nOne\n", "line 2 has no text or label"),
        ("text,label\nOne,x\nTwo,x\n", "needs texts with two labels or more"),
    ],
)
def test_wrong_csv(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"mine.csv: {message}"):
        labelled.load(LabelledTextOptions(csv=str(path)))


def test_too_few_to_split():
    with pytest.raises(UserError, match="2 texts are too few"):
        labelled.split(ROWS[:2])


def test_examples_are_cut_and_padded():
    tokenizer = masking.wordpiece([row.text for row in ROWS], 100)
    rows = [Labelled("many", "b"), Labelled("Sentence 12 of many, many, many", "a")]
    short, long = Examples(rows, ["a", "b"], tokenizer, 6)
    many = tokenizer.token_to_id("many")
    assert short["tokens"].tolist() == [2, many, 3, 0, 0, 0]
    assert short["mask"].tolist() == [True] * 3 + [False] * 3
    assert long["tokens"][[0, -1]].tolist() == [2, 3]
    assert long["mask"].all()
    assert (short["label"], long["label"]) == (1, 0)


def test_a_length_without_a_place_for_text_is_refused():
    tokenizer = masking.wordpiece([row.text for row in ROWS], 100)
    with pytest.raises(UserError, match="--seq-len 2: must be at least 3"):
        Examples(ROWS, ["a", "b"], tokenizer, 2)
    spelled = Examples([Labelled("[MASK]", "a")], ["a"], tokenizer, 8)[0]["tokens"]
    assert tokenizer.token_to_id("[MASK]") not in spelled


def test_frequency_loss():
    train = [Labelled("", label) for label in "aaab"]
    test = [Labelled("", label) for label in "ab"]
    expected = -(np.log(0.75) + np.log(0.25)) / 2
    assert labelled.frequency_loss(train, test) == pytest.approx(expected)
    with pytest.raises(UserError, match="label 'c' is too rare"):
        labelled.frequency_loss(train, [*test, Labelled("", "c")])
