"""Every figure in a sentence of README and docs comes from a committed result file."""

import pytest


@pytest.fixture
def figures(benchmarks):
    return benchmarks.figures


def test_every_figure_of_the_pages_follows_from_a_result_file(figures):
    assert figures.problems() == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("It is 1.45 times as fast.", 1),
        ("It takes 1.02 and 0.95 s, 3 % less, off by 2e-6.", 3),
        ("The distance was 0.484 (own sampler 0.483).", 2),
        ("An H100 at 64 rows, MAR-B, 40 steps, arXiv 2411.11925, PyTorch 2.11 and 2.13 for CPU", 0),
        ("`1.5 s`, [1.5 s](x-2.5-s.md), <!-- A -->1.5 s<!-- /A -->", 1),
    ],
)
def test_figures_are_found(figures, text, found):
    assert len(figures.unclaimed(text, [])[0]) == found


def test_claimed_words_are_taken_out_and_missed_where_they_are_not(figures):
    assert figures.unclaimed("It takes 1.5 s, then 2.5 s.", ["takes 1.5 s"])[0] == ["...It , then 2.5 s...."]
    assert figures.unclaimed("It takes 1.5 s.", ["takes 1.6 s"])[1] == ["takes 1.6 s"]


@pytest.mark.parametrize(
    "shown, value, agrees",
    [
        ("1.45", 1.4549, True), ("1.45", 1.4551, False), ("2e-6", 2.4e-6, True), ("2e-6", 2.6e-6, False),
        ("1,024", 1024, True), ("59", 59.4, True), ("59", 59.6, False),
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
