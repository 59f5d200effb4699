"""Our reader of GGUF headers against that of the gguf package."""

import gguf
import jax
import numpy as np

from kvcompress_jax.models.gguf_header import read_header
from kvcompress_jax.models.params import init_params
from tests.models.files import hf_settings, hf_state, write_gguf
from tests.models.smollm2 import smollm2_file
from tests.models.tiny import CONFIGS


def check(path):
    header, reader = read_header(path), gguf.GGUFReader(path)
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == expected
    assert list(header.tensors) == [t.name for t in reader.tensors]
    for t in reader.tensors:
        ours = header.tensors[t.name]
        assert ours.shape == tuple(t.shape.tolist())[::-1]
        assert ours.kind == t.tensor_type
        np.testing.assert_array_equal(ours.data.ravel(), t.data.reshape(-1).view(np.uint8))
    return header


def test_smollm2():
    header = check(smollm2_file())
    assert {t.kind.name for t in header.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


def test_all_kinds_of_metadata(tmp_path):
    config = CONFIGS["gemma3"]  # with a list of booleans
    state = hf_state(init_params(config, jax.random.key(0)), config)
    path = write_gguf(hf_settings(config), state, tmp_path / "m.gguf")
    assert isinstance(check(path).metadata["gemma3.attention.sliding_window_pattern"], list)
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "x")
    writer.add_custom_alignment(128)
    for i, kind in enumerate(["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64"]):
        getattr(writer, f"add_{kind}")(f"k{i}", 7)
    writer.add_int64("long", -(2**40))
    writer.add_float64("double", 0.1)
    writer.add_float32("float", 0.5)
    writer.add_bool("bool", True)
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("a", np.arange(5, dtype=np.float32))
    writer.add_tensor("b", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check(tmp_path / "n.gguf").metadata["texts"] == ["a", "", "é"]
