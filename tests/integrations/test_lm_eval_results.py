"""``detinfer eval diff`` on files written by hand, as the harness writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

DATE = "2026-11-22T10-15-00.809897"


def sample(number: int, *answers: str, prompt: str = "p") -> dict[str, Any]:
    resps = [[[answer, "False"]] for answer in answers]
    hashes = {"doc_hash": "d", "prompt_hash": prompt, "target_hash": "t"}
    return {"doc_id": number, "filter": "none", "resps": resps, "filtered_resps": resps, "arguments": {}, **hashes}


def write(folder: Path, *samples: dict[str, Any], date: str = DATE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"samples_choices_{date}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (folder / f"results_{date}.json").write_text("{}")
    return folder


def test_what_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample and the answer's number; one last digit is enough, and so is the sign of a zero."""
    a = write(tmp_path / "a", sample(0, "-1.5", "-2.5"), sample(10, "0.0"), sample(2, "-3.0"))
    b = write(tmp_path / "b", sample(0, "-1.5", "-2.5000000000000004"), sample(10, "-0.0"), sample(2, "-3.0"))
    assert cli.run(["eval", "diff", str(a), str(a)]) == 0
    assert cli.run(["eval", "diff", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert (
        'document 0: answers 1; the first is [["-2.5", "False"]] in a, [["-2.5000000000000004", "False"]] in b' in said
    )
    assert "document 10: answers 0" in said and "document 2:" not in said
    assert "3 samples compared: 2 answered differently" in said


def test_other_questions_and_missing_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are differences of their own: their answers are not held against each other."""
    a = write(tmp_path / "a", sample(0, "-1.5"), sample(1, "-1.5"))
    b = write(tmp_path / "b", sample(0, "-9.5", prompt="another"), sample(2, "-1.5"))
    assert cli.run(["eval", "diff", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "inputs    task choices, document 0: another prompt" in said
    assert "document 1: only in a" in said and "document 2: only in b" in said
    assert "0 answered differently, 1 asked differently, 2 in one run only" in said


def test_the_newest_results_of_a_folder(tmp_path: Path) -> None:
    """A folder stands for its newest run; a file for its own."""
    a = write(tmp_path / "a", sample(0, "-1.5"))
    write(a, sample(0, "-2.5"), date="2026-11-23T00-00-00.000001")
    b = write(tmp_path / "b", sample(0, "-2.5"))
    assert cli.run(["eval", "diff", str(a), str(b)]) == 0
    assert cli.run(["eval", "diff", str(a / f"results_{DATE}.json"), str(b)]) == 1
    assert cli.run(["eval", "diff", str(a / f"samples_choices_{DATE}.jsonl"), str(b)]) == 1


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No sample is vacuous; no file, no samples and no JSON are said."""
    a = write(tmp_path / "a")
    assert cli.run(["eval", "diff", str(a), str(a)]) == 5
    (tmp_path / "empty").mkdir()
    assert cli.run(["eval", "diff", str(a), str(tmp_path / "empty")]) == 4
    assert "--output_path" in capsys.readouterr().err
    (a / f"samples_choices_{DATE}.jsonl").write_text("{\n")
    assert cli.run(["eval", "diff", str(a), str(a)]) == 4
    assert "not a sample" in capsys.readouterr().err
    (a / f"samples_choices_{DATE}.jsonl").unlink()
    assert cli.run(["eval", "diff", str(a), str(a)]) == 4
    assert "--log_samples" in capsys.readouterr().err
