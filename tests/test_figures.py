"""Every figure in a sentence of README and docs comes from a committed result file."""

import json
import re

import pytest


@pytest.fixture
def figures(benchmarks):
    return benchmarks.figures


def test_every_figure_of_the_pages_follows_from_a_result_file(figures):
    """If it fails: python benchmarks/figures.py says what, figures_claims.py holds what is known."""
    assert figures.problems() == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("It is 1.45 times as fast.", 1),
        ("It takes 1.02 and 0.95 s, 3 % less, off by 2e-6.", 3),
        ("The distance was 0.484 (own sampler 0.483).", 2),
        ("A correlation of -0.37, a gain of 2x, then 1.8x, in place of 2.8.", 4),
        ("It takes 10 to 27 sweeps and 12 calls.", 2),
        ("An H100 at 64 rows, MAR-B, 40 steps, arXiv 2411.11925, PyTorch 2.11 and 2.13 for CPU", 0),
        ("A tile of 16 x 16, 1,024 wide, of 2 x (256 + 64) rows", 0),
        ("`1.5 s`, [1.5 s](x-2.5-s.md), <!-- A -->1.5 s<!-- /A -->", 1),
    ],
)
def test_figures_are_found(figures, text, found):
    assert len(figures.unclaimed(text, [])[0]) == found


def test_words_hold_their_figures_where_they_stand_once(figures):
    left = figures.unclaimed("It takes 1.5 s, then 2.5 s.", ["takes 1.5 s"])
    assert left == (["...It takes 1.5 s, then 2.5 s...."], [])
    assert figures.unclaimed("It takes 1.5 s.", ["takes 1.5 s", "It takes"]) == ([], [])
    assert figures.unclaimed("It takes 1.5 s.", ["takes 1.6 s"])[1] == ["takes 1.6 s"]
    assert figures.unclaimed("1.5 s here, 1.5 s there", ["1.5 s"])[1] == ["1.5 s"]


@pytest.mark.parametrize(
    "shown, value, agrees",
    [
        ("1.45", 1.4549, True), ("1.45", 1.4551, False), ("2e-6", 2.4e-6, True), ("2e-6", 2.6e-6, False),
        ("1,024", 1024, True), ("59", 59.4, True), ("59", 59.6, False), ("-0.37", -0.37, True), ("-0.37", 0.37, False),
    ],
)  # fmt: skip
def test_rounding(figures, shown, value, agrees):
    assert figures.agrees(shown, value) is agrees


def test_a_bound_may_lie_a_little_above(figures):
    assert figures.agrees("5e-6", 4.2e-6, at_most=True) and not figures.agrees("5e-6", 3e-6, at_most=True)
    assert not figures.agrees("5e-6", 5.6e-6, at_most=True)


def test_a_claim_that_does_not_follow_is_told(figures):
    assert figures.Claim("1.45 times, 0.48", lambda: [1.452, 0.481]).wrong() == []
    assert len(figures.Claim("1.45 times, 0.48", lambda: [1.46, 0.481]).wrong()) == 1
    assert "2 numbers" in figures.Claim("1.45 times, 0.48", lambda: [1.45]).wrong()[0]
    assert "4 numbers" in figures.Claim("8 tokens and gamma 4: 1.8x, 2 s", lambda: [1.8, 2]).wrong()[0]
    assert "no such row" in figures.Claim("1.45 times", lambda: {}["no such row"]).wrong()[0]


def test_another_figure_in_any_page_is_told(figures, benchmarks, monkeypatch):
    """One figure of every claim is changed in its page: each is told."""
    pages, claims = figures.pages(), benchmarks.figures_claims.CLAIMS
    for page, known in claims.items():
        text = figures.prose(pages[page])
        for claim in known:
            words = figures.prose(claim.words).strip()
            number = figures.numbers(words)[-1]
            start = words.rindex(number)
            other = f"{words[:start]}{9 if number[0] != '9' else 8}{words[start + 1 :]}"
            _, missing = figures.unclaimed(text.replace(words, other), [each.words for each in known])
            assert words in missing, (page, words)
    monkeypatch.setattr(figures, "pages", lambda: {page: re.sub(r"\d", "7", text) for page, text in pages.items()})
    assert {line.partition(":")[0] for line in figures.problems()} >= {*claims}


# Words of these pages whose numbers follow from sizes or formulas, not from a result file.
COMPUTED = {"docs/kernels.md", "CONTRIBUTING.md"}


def test_another_result_makes_claims_wrong(benchmarks, figures, monkeypatch, tmp_path):
    """With all measured numbers a quarter larger, the claims of every page that were taken from a file are wrong."""

    settings = ("parallel_tol", "note", "blocks")

    def larger(value):
        if isinstance(value, dict):
            return {key: each if key in settings else larger(each) for key, each in value.items()}
        if isinstance(value, list):
            return [larger(each) for each in value]
        return 1.25 * value if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    tables, sources, claims = benchmarks.report_tables, benchmarks.figures_sources, benchmarks.figures_claims.CLAIMS
    for file in tables.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_text(json.dumps(larger(json.loads(file.read_text()))))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    sources.results.cache_clear()
    wrong = {page: sum(bool(claim.wrong()) for claim in known) for page, known in claims.items()}
    sources.results.cache_clear()
    assert {page for page, count in wrong.items() if count < len(claims[page]) / 2} == COMPUTED, wrong
