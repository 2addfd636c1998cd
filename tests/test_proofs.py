"""The check that no test passes by doing nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from .proofs import findings, main


def found_in(folder: Path, text: str) -> list[tuple[int, str]]:
    """Line and words of what is found in a test file beside a helpers file."""
    folder.joinpath("helpers.py").write_text(
        "def deep(x):\n    assert x\ndef check(x):\n    deep(x)\ndef show(x):\n    print(x)\n"
        "@pytest.fixture\ndef made():\n    assert True\n"
    )
    path = folder / "test_it.py"
    path.write_text(text)
    found = findings(folder)
    assert {finding.path for finding in found} <= {path}
    return [(finding.line, finding.what) for finding in found]


@pytest.mark.parametrize(
    "body",
    [
        "assert x",
        "with pytest.raises(ValueError): x()",
        "with pytest.warns(UserWarning): x()",
        "check(x)",
        "deep(x)",
        "run_in_threads(3, check)",
        "def program(): assert x\n    run(program)",
        "assert x\n    if x: return\n    deep(x)",
        "try: x()\n    except ValueError:\n        assert x\n        return\n    assert x",
        "def program():\n        if x: return\n        deep(x)\n    run(program)",
    ],
)
def test_tests_that_prove_something_pass(tmp_path: Path, body: str) -> None:
    """Assertions, what pytest expects, and helpers that assert, however far away, prove something; a return
    behind an assertion, or in a function inside the test, hides none."""
    assert found_in(tmp_path, f"from .helpers import check, deep\ndef test_it(x):\n    {body}\n") == []


@pytest.mark.parametrize(
    "body", ["pass", "show(x)", "x.assert_it()", "check", "made", "pytest.skip('no')", "return x"]
)
def test_tests_that_prove_nothing_are_found(tmp_path: Path, body: str) -> None:
    """Calling things is no assertion, nor is what a fixture asserts, nor a parameter named like a helper."""
    text = f"from .helpers import show, made, check\ndef test_it(x, check):\n    {body}\n"
    assert found_in(tmp_path, text) == [(2, "test_it asserts nothing")]


@pytest.mark.parametrize(
    "rest", ["assert x", "check(x)", "def program():\n        assert x\n    run(program)"]
)
def test_cases_that_return_before_they_assert_are_found(tmp_path: Path, rest: str) -> None:
    """A case that has nothing to prove should not be one."""
    text = f"from .helpers import check\ndef test_it(x):\n    if x == 1:\n        return\n    {rest}\n"
    assert found_in(tmp_path, text) == [(4, "test_it returns before it asserts anything")]


def test_a_finding_is_a_line_that_leads_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Path from the folder above, line, and what; code 1 if anything is found."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("\n\ndef test_it():\n    pass\n")
    assert main(tmp_path / "tests") == 1
    assert capsys.readouterr().out == "tests/test_it.py:3: test_it asserts nothing\n"
    (tmp_path / "tests/test_it.py").write_text("def test_it():\n    assert True\n")
    assert main(tmp_path / "tests") == 0
    assert capsys.readouterr().out == ""
