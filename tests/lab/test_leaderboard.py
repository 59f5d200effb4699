"""The leaderboard says who is better, and only where it is."""

import pytest

from kvcompress_jax.lab.bench import Fidelity
from kvcompress_jax.lab.compare import Comparison, Result, Setting, closest
from kvcompress_jax.lab.leaderboard import as_markdown, rows

SETTING = Setting(bits=(4.5,))


def result(method, kl, text="prose", bits=4.5, target=4.5, recalled=0.5):
    fidelity = Fidelity(
        bits=bits,
        kl_mean=kl,
        kl_p99=kl,
        delta_nll=0.0,
        top1_agreement=1.0,
        retrieval=recalled,
        recalled=(),
    )
    return Result(
        model="m", text=text, method=method, settings=method, target_bits=target, fidelity=fidelity
    )


def verdict(*results):
    text = as_markdown(Comparison(results, ()), SETTING, command="c")
    lines = [line for line in text.splitlines() if line.startswith("| m | 4.5 |")]
    return lines[0].split("|")[-2].strip() if lines else None


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        ((0.001, 0.001), (0.002, 0.003), "ours"),
        ((0.001, 0.001), (0.0012, 0.0012), "tie"),  # within the noise
        ((0.001, 0.003), (0.010, 0.002), "tie"),  # one of the texts says otherwise
        ((0.004, 0.004), (0.001, 0.002), "**kivi**"),
    ],
)
def test_verdict(ours, others, expected):
    found = [
        result(method, kl, text)
        for method, kls in (("embedded", ours), ("kivi", others))
        for text, kl in zip(("prose", "code"), kls, strict=True)
    ]
    assert verdict(*found) == expected


def test_the_best_of_either_side_is_compared():
    found = [result("recipe-extreme", 0.1), result("calibrated", 0.001)]
    found += [result("turboquant", 0.5), result("kivi", 0.01)]
    assert verdict(*found) == "ours"
    # Another choice of tokens is a control: neither ours nor another's.
    controls = [result("random-selection", 1e-6), result("importance-key_norm", 1e-6)]
    assert verdict(*found, *controls) == "ours"
    assert verdict(found[0], found[3], *controls) == "**kivi**"


def test_no_verdict_without_both_sides():
    assert verdict(result("calibrated", 0.001)) is None
    assert verdict(result("kivi", 0.001)) is None


def test_a_text_that_is_not_measured_yet_shows_as_such():
    found = [result("kivi", 0.01), result("kivi", 0.02, "code"), result("fp8", 0.03)]
    text = as_markdown(Comparison(tuple(found), ()), SETTING, command="c")
    assert "| fp8 | 4.50 | 0.03000 | 0.03000 | - |" in text
    kivi, _ = rows(found, "m")
    assert kivi.kl_by_text == {"prose": 0.01, "code": 0.02}


def test_rates_are_those_that_methods_come_closest_to():
    assert closest((8.0, 4.5, 3.5), 4.44) == 4.5
    assert closest((8.0, 4.5), 6.6) == 8.0
