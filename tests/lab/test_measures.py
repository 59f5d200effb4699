"""The measures themselves, against float64 and with controls."""

import jax
import numpy as np
import pytest

from kvcompress_jax.lab.divergence import divergence
from kvcompress_jax.lab.output import OutputError, replacing, write_json
from kvcompress_jax.lab.retrieval import plant_facts
from kvcompress_jax.lab.texts import TextError, load_text, split_texts, take_tokens


def reference(p_logits, q_logits, targets):
    p, q = (np.asarray(x, np.float64) for x in (p_logits, q_logits))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    rows = np.arange(len(targets))
    return (np.exp(p) * (p - q)).sum(-1), p[rows, targets] - q[rows, targets]


@pytest.mark.parametrize("noise", [1e-3, 0.1, 2.0])
def test_divergence(noise):
    p = jax.random.normal(jax.random.key(0), (20, 500)) * 3
    q = p + noise * jax.random.normal(jax.random.key(1), p.shape)
    targets = np.arange(20, dtype=np.int32)
    found = divergence(p, q, targets)
    kl, delta = reference(p, q, targets)
    # Float32 log-probabilities are off by some 1e-6, which counts once in the likelihood, and
    # times the difference in the divergence.
    assert np.all(np.abs(found.kl - kl) <= 1e-5 * noise + 1e-3 * kl)
    assert np.all(np.abs(found.delta_nll - delta) <= 1e-5)
    assert np.array_equal(found.agree, np.argmax(p, -1) == np.argmax(q, -1))
    backwards, _ = reference(q, p, targets)
    if noise > 1:
        assert not np.all(np.abs(found.kl - backwards) <= 1e-5 * noise + 1e-3 * kl)


def test_divergence_of_equals_is_zero():
    p = jax.random.normal(jax.random.key(0), (4, 100))
    found = divergence(p, p, np.zeros(4, np.int32))
    assert not found.kl.any() and not found.delta_nll.any() and found.agree.all()


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text):
        return [ord(c) for c in text]


def test_facts_are_planted_evenly_and_can_be_asked_for():
    text = Letters().encode("." * 5000)
    facts = plant_facts(Letters(), text, context_tokens=2000, facts=10)
    context = "".join(map(chr, facts.context))
    assert len(facts.context) == 2000
    places = []
    for question, answer in zip(facts.questions, facts.answers, strict=True):
        whole = "".join(map(chr, question + answer))
        assert context.count(whole) == 1
        places.append(context.index(whole))
    assert np.all(np.abs(np.diff(sorted(places)) - 200) < 20)
    assert len(set(map(tuple, facts.questions))) == 10
    with pytest.raises(TextError, match="context: no room for 10 facts in 100 tokens"):
        plant_facts(Letters(), text, context_tokens=100, facts=10)


def test_texts(tmp_path):
    assert len(load_text()) > 100_000
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="expected a text file in UTF-8, got: "):
        load_text(path)
    assert take_tokens([1, 2, 3], 2, name="text") == [1, 2]
    with pytest.raises(TextError, match="text: expected at least 4 tokens, got 3"):
        take_tokens([1, 2, 3], 4, name="text")
    assert split_texts({"a": "abcdefg"}, 1) == {"a": "abcdefg"}
    assert split_texts({"a": "abcdefg", "b": "xy"}, 2) == {
        "a 1/2": "abc",
        "a 2/2": "def",
        "b 1/2": "x",
        "b 2/2": "y",
    }


def test_output_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": float("nan"), "b": [1.5, (2,)]})
    before = path.read_text()
    assert before == '{\n  "a": null,\n  "b": [\n    1.5,\n    [\n      2\n    ]\n  ]\n}\n'

    def broken():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match=r"out\.json: No such file or directory"):
        write_json(tmp_path / "nowhere" / "out.json", {})
