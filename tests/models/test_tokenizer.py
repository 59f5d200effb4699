"""Tokenizers from GGUF files and Hugging Face directories."""

import argparse
import inspect
import itertools
import json
import string
from pathlib import Path

import gguf
import pytest

from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.gguf_header import read_header
from kvcompress_jax.models.gguf_metadata import Metadata
from kvcompress_jax.models.gguf_tokenizer import tokenizer_from_metadata
from kvcompress_jax.models.hf_tokenizer import tokenizer_from_directory
from kvcompress_jax.models.tokenizer import Tokenizer
from tests.models.smollm2 import smollm2_file
from tests.models.vocabularies import SPACE, write_byte_level, write_sentencepiece

CODE = inspect.getsource(argparse)
TEXTS = {
    "prose": inspect.cleandoc(argparse.__doc__ or "")
    + " It's what they'd say, isn't it? I'M HERE.",
    "code": CODE[:20_000],
    "numbers": "In 2024, 1234567 people paid $3.50 or 12,000; 0x1F and v1.2.3\n\n  99 3 times  ",
    "unicode": (
        "Größe naïve — “quotes” … 你好，世界 こんにちは Привет 🙂👩‍👩‍👧 عربى हिन्दी "
        "\u00a0x\u3000y \r\n\t\tend \n \n\n   "
    ),
    "special": "<|im_start|>user\nhi <|im_end|>\n<|endoftext|>x <|im_start|>",
    "empty": "",
}
SPLITS = ["gpt-2", "smollm", "llama-bpe", "qwen2"]


def read(path: Path) -> Tokenizer:
    tokenizer = tokenizer_from_metadata(Metadata(path.name, read_header(path).metadata), 10_000)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=SPLITS)
def byte_level(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    return write_byte_level(path, request.param, CODE[:6_000], merges=250)


@pytest.fixture
def llama_cpp_ids():
    """(path, text, add_bos) to the ids that llama.cpp gives."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is llama.cpp")
    models = {}

    def ids(path: Path, text: str, *, add_bos: bool = False) -> list[int]:
        if path not in models:
            models[path] = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return models[path].tokenize(text.encode(), add_bos=add_bos, special=True)

    yield ids
    for model in models.values():
        model.close()


@pytest.mark.parametrize("name", TEXTS)
def test_text_survives(byte_level, name):
    tokenizer = read(byte_level)
    ids = tokenizer.encode(TEXTS[name])
    assert tokenizer.decode(ids) == TEXTS[name]
    assert name == "empty" or max(ids) > 256, "something was merged"


def test_byte_level_against_llama_cpp(byte_level, llama_cpp_ids):
    tokenizer = read(byte_level)
    for name, text in TEXTS.items():
        assert tokenizer.encode(text) == llama_cpp_ids(byte_level, text), name


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["I", "'m", " 12345", " ok", ",", "\n ", " x"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " ok", ",", "\n ", " x"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " ok", ",\n", " ", " x"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " ok", ",\n", " ", " x"]),
    ],
)
def test_splits(pre, expected, tmp_path):
    tokenizer = read(write_byte_level(tmp_path / "v.gguf", pre, "some text to learn", merges=3))
    parts = tokenizer._backend.pre_tokenizer.pre_tokenize_str("I'm 12345 ok,\n  x")
    assert [p.replace("Ġ", " ").replace("Ċ", "\n") for p, _ in parts] == expected


def test_qwen2_composes_characters(tmp_path):
    tokenizer = read(write_byte_level(tmp_path / "v.gguf", "qwen2", "some text", merges=3))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


# Scores fall with the length of what is merged, and once against the order of the text.
PIECES = {piece: -float(i) for i, piece in enumerate(
    ["he", "in", "th", SPACE + "t", "ing", SPACE + "th", "hello", "ell", SPACE + "the", "lo", "hel",
     "er", SPACE + "a", "an", "re", "ll", *string.ascii_letters, *" .,!?'", SPACE, "é", "你"]
) if piece != " "}  # fmt: skip


def reference_sentencepiece(text: str, pieces: dict[str, float]) -> list[str]:
    """Merges the neighbours with the best score, the first of equals, until none are left."""
    symbols = list(text.replace(" ", SPACE))
    while True:
        scores = [pieces.get(a + b) for a, b in itertools.pairwise(symbols)]
        known = [s for s in scores if s is not None]
        if not known:
            break
        i = scores.index(max(known))
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out = []
    for s in symbols:
        out += [s] if s in pieces else [f"<0x{b:02X}>" for b in s.encode()]
    return out


SENTENCES = [
    "hello the thing",
    "there in the inner hell, hellothethe",
    "  two  spaces ",
    "é 你好 🙂",
    "a\nb",
    "",
]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", SENTENCES)
def test_sentencepiece(text, prefix, tmp_path):
    path = write_sentencepiece(tmp_path / "v.gguf", PIECES, add_space_prefix=prefix)
    tokenizer = read(path)
    vocabulary = {i: t for t, i in tokenizer._backend.get_vocab().items()}
    ids = tokenizer.encode(text)
    padded = " " + text if prefix and text else text
    assert [vocabulary[i] for i in ids] == reference_sentencepiece(padded, PIECES)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False, None])
def test_sentencepiece_against_llama_cpp(prefix, tmp_path, llama_cpp_ids):
    path = write_sentencepiece(tmp_path / "v.gguf", PIECES, add_space_prefix=prefix)
    tokenizer = read(path)
    for text in [*SENTENCES, "x<s>hello</s> the"]:
        assert tokenizer.encode(text) == llama_cpp_ids(path, text)
        assert tokenizer.encode(text, add_special=True) == llama_cpp_ids(path, text, add_bos=True)


def test_special_tokens(tmp_path):
    tokenizer = read(write_byte_level(tmp_path / "v.gguf", "llama-bpe", "some text", merges=2))
    end, start, turn, think = range(tokenizer.vocab_size - 4, tokenizer.vocab_size)
    assert tokenizer.encode("<|im_start|>a<think><|im_end|>")[::1] == [
        start,
        *tokenizer.encode("a"),
        think,
        turn,
    ]
    assert tokenizer.encode("a", add_special=True) == [end, *tokenizer.encode("a")]
    assert tokenizer.eos_ids == (end, turn), "the one the file names, and the end of a text"
    ids = tokenizer.encode("<|im_start|>a<think>")
    assert tokenizer.decode(ids) == "<|im_start|>a<think>"
    assert tokenizer.decode(ids, skip_special=True) == "a<think>"


def test_half_a_character_is_replaced(tmp_path):
    tokenizer = read(write_byte_level(tmp_path / "v.gguf", "smollm", "some text", merges=2))
    ids = tokenizer.encode("é")
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_smollm2_against_transformers(smollm2):
    """Without digits: `transformers` does not read how the file wants them to be split."""
    from tests.models import hf

    file = smollm2_file()
    reference = hf.transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for name, text in TEXTS.items():
        plain = "".join(c for c in text if not c.isdigit())
        ids = smollm2.tokenizer.encode(plain)
        assert ids == reference(plain)["input_ids"], name
        assert smollm2.tokenizer.decode(ids) == plain, name


def test_smollm2_against_llama_cpp(smollm2, llama_cpp_ids):
    for name, text in TEXTS.items():
        assert smollm2.tokenizer.encode(text) == llama_cpp_ids(smollm2_file(), text), name


def test_chat_template_of_smollm2(smollm2):
    messages = [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = smollm2.tokenizer.chat(messages)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    assert "user\nHi <b><|im_end|>" in text
    assert smollm2.tokenizer.chat(messages, add_generation_prompt=False).endswith("Bye<|im_end|>\n")


def _with_template(template):
    import tokenizers

    return Tokenizer(
        tokenizers.Tokenizer(tokenizers.models.BPE()),
        chat_template=template,
        special_tokens={"bos_token": "<s>"},
    )


def test_chat_templates_have_what_they_expect():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{% if tools %}x{% endif %}"
    )
    tokenizer = _with_template(template)
    messages = [{"role": "skip"}, {"role": "user", "content": "<é>"}]
    assert tokenizer.chat(messages) == '<s>{"role": "user", "content": "<é>"}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template: use it with plain text"),
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{% if %}", "the model's chat template failed: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "the model's chat template failed"),
        ("{{ messages[0].content.x.y }}", "the model's chat template failed"),
    ],
)
def test_chat_errors(template, message):
    with pytest.raises(ModelError, match=message) as e:
        _with_template(template).chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(e.value)


def test_directory(tmp_path):
    import tokenizers

    assert tokenizer_from_directory(tmp_path, eos_ids=()) is None
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = tokenizer_from_directory(tmp_path, eos_ids=(7,))
    assert plain.encode("abb</s>") == [2, 1, 4]
    assert plain.eos_ids == (7,)
    assert plain.chat_template is None
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "chat_template": [
            {"name": "tool_use", "template": "t"},
            {"name": "default", "template": "d"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    full = tokenizer_from_directory(tmp_path, eos_ids=(7,))
    assert full.eos_ids == (4, 7)
    assert full.chat([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}j")
    assert tokenizer_from_directory(tmp_path, eos_ids=()).chat([]) == "<s>j"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not readable"):
        tokenizer_from_directory(tmp_path, eos_ids=())


def _metadata(path, tmp_path, **changes):
    """The file's metadata with some values replaced, or left out where None."""
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "llama")
    for name, field in gguf.GGUFReader(path).fields.items():
        short = name.rpartition(".")[2]
        if name.startswith("GGUF.") or name == "general.architecture" or short in changes:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for short, value in changes.items():
        name = f"tokenizer.ggml.{short}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Metadata("changed.gguf", read_header(tmp_path / "changed.gguf").metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "falcon"}, r"tokenizer.ggml.pre 'falcon' is not supported, only gpt-2, smollm"),
        ({"pre": None}, r"tokenizer.ggml.pre '' is not supported"),
        ({"model": "rwkv"}, r"tokenizer 'rwkv' is not supported, only gpt2, llama"),
        ({"model": None}, r"metadata tokenizer.ggml.model is missing"),
        ({"merges": ["a zz"]}, r"the tokenizer is inconsistent: .*zz"),
        ({"merges": ["ab"]}, r"the tokenizer is inconsistent"),
        ({"bos_token_id": 10**6}, r"bos_token_id: expected less than \d+, got 1000000"),
        ({"bos_token_id": "x"}, r"bos_token_id: expected int, got 'x'"),
        ({"tokens": ["a", "a"]}, r"tokenizer.ggml.tokens: a token is there twice"),
        ({"tokens": "abc"}, r"tokenizer.ggml.tokens: expected a list, got 'abc'"),
        ({"model": "llama"}, r"tokenizer.ggml.scores: expected \d+, got 0"),
    ],
)
def test_unusable_metadata(changes, message, tmp_path):
    path = write_byte_level(tmp_path / "v.gguf", "gpt-2", "some text", merges=2)
    with pytest.raises(ModelError, match=rf"^changed\.gguf: .*{message}") as e:
        tokenizer_from_metadata(_metadata(path, tmp_path, **changes), 10_000)
    assert "\n" not in str(e.value)


def test_more_tokens_than_rows_are_refused(tmp_path):
    path = write_byte_level(tmp_path / "v.gguf", "gpt-2", "some text", merges=2)
    with pytest.raises(ModelError, match="expected at most 10, the rows of the embedding, got 262"):
        tokenizer_from_metadata(Metadata("f", read_header(path).metadata), 10)
