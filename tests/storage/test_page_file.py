"""The page file: what is written comes back, to the bit; what is not right does not."""

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kvcompress_jax.storage import header as header_module
from kvcompress_jax.storage.errors import PageFileError
from kvcompress_jax.storage.files import Files, write_atomically
from kvcompress_jax.storage.header import DTYPES
from kvcompress_jax.storage.page_file import (
    PREFIX_BYTES,
    VERSION,
    PageRecord,
    decode_page,
    encode_page,
    read_header,
)
from tests.storage.pages import planes, record, same_planes

texts = st.text(min_size=1, max_size=20).filter(str.isprintable)
bits = hnp.arrays(np.uint8, st.integers(0, 64))


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype.kind == "b":
        data = bytes(b & 1 for b in data)
    return np.frombuffer(data, dtype).reshape(shape)


@hypothesis.given(
    key=st.binary(min_size=1, max_size=64),
    model=texts,
    codec=texts,
    level=st.integers(0, 255),
    tokens_hash=st.binary(max_size=64),
    session=st.binary(max_size=64),
    planes=st.dictionaries(texts, arrays(), max_size=5),
    compression=st.sampled_from([None, 1]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_page_comes_back(planes, compression, **fields):
    """Any names, bits (NaNs too), shapes and dtypes."""
    page = PageRecord(planes=planes, **fields)
    back = decode_page(b"".join(encode_page(page, compression=compression)))
    assert same_planes(back.planes, planes)
    assert {f: getattr(back, f) for f in fields} == fields


@pytest.mark.parametrize("compression", [None, 3])
def test_no_byte_may_change_or_be_missing(compression):
    data = b"".join(encode_page(record(), compression=compression))
    decode_page(data)
    for i in range(len(data)):
        changed = bytearray(data)
        changed[i] ^= 1 << (5 * i % 8)
        with pytest.raises(PageFileError):
            decode_page(bytes(changed))
        with pytest.raises(PageFileError):
            decode_page(data[:i])
    with pytest.raises(PageFileError) as e:
        decode_page(data + b"\0")
    assert e.value.fault == "corrupted"


def test_faults_have_names():
    data = b"".join(encode_page(record()))
    later = data[:8] + (VERSION + 1).to_bytes(2, "little") + data[10:]
    for wrong, fault, message in (
        (b"", "foreign", "expected a page file, got something else"),
        (b"PK\x03\x04" + data[4:], "foreign", "expected a page file, got something else"),
        (data[:6], "truncated", f"expected at least {PREFIX_BYTES} bytes, got 6"),
        (data[:100], "truncated", "header: expected "),
        (data[:-1], "truncated", f"expected {len(data)} bytes, got {len(data) - 1}"),
        (later, "version", f"version: expected {VERSION}, got {VERSION + 1}"),
        (data[:-1] + b"\xff", "corrupted", "plane order: expected bytes of its checksum"),
        (data[:60] + b"\xff" + data[61:], "corrupted", "header: expected bytes of its checksum"),
    ):
        with pytest.raises(PageFileError) as e:
            decode_page(wrong)
        assert e.value.fault == fault and message in str(e.value), (str(e.value), message)


def test_compression_pays_and_changes_no_bit():
    page = record(planes={"base": planes(tokens=256)["base"], "noise": np.arange(200, dtype="u1")})
    plain, small = (encode_page(page, compression=c) for c in (None, 3))
    assert sum(map(len, small)) < 0.97 * sum(map(len, plain))
    data = b"".join(small)
    infos = read_header(data, file_bytes=len(data)).planes
    assert [p.encoding for p in infos] == ["zstd", "raw"]  # noise gets no smaller
    assert same_planes(decode_page(data).planes, page.planes)
    assert read_header(data, file_bytes=len(data)).nbytes == page.nbytes


def test_a_plane_of_one_value_is_stored_as_it_is():
    """A reader must not need much more memory than the file is long."""
    data = b"".join(encode_page(record(planes={"zeros": np.zeros(10**6, "u1")}), compression=19))
    assert len(data) > 10**6
    assert decode_page(data).planes["zeros"].sum() == 0


def test_the_header_does_not_need_the_planes():
    data = b"".join(encode_page(record()))
    start = data[: len(data) - 600]
    assert read_header(start, file_bytes=len(data)).key == record().key
    for wrong in (len(start), len(data) - 1, len(data) + 1):
        with pytest.raises(PageFileError, match=rf"expected {len(data)} bytes, got {wrong}"):
            read_header(start, file_bytes=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": b""}, "key: expected 1 to 64 bytes, got b''"),
        ({"key": bytes(65)}, "key: expected 1 to 64 bytes"),
        ({"tokens_hash": bytes(65)}, "tokens_hash: expected at most 64 bytes"),
        ({"model": ""}, "model: expected 1 to 256 printable characters, got ''"),
        ({"codec": "x" * 257}, "codec: expected 1 to 256 printable characters"),
        ({"model": "\x1b[2J"}, "model: expected 1 to 256 printable characters"),
        ({"level": 256}, "level: expected 0 to 255, got 256"),
        ({"planes": {"x": np.zeros(1)}}, "plane x: expected one of "),
        ({"planes": {"x": np.zeros((1,) * 9, "u1")}}, "plane x: expected at most 8 axes, got "),
        ({"planes": {str(i): np.zeros(1, "u1") for i in range(65)}}, "planes: expected at most 64"),
    ],
)
def test_what_no_file_can_hold(change, message):
    with pytest.raises(ValueError, match=message):
        record(**change)


def test_a_header_that_got_too_long():
    many = {"\u20ac" * 200 + str(i): np.zeros(1, "u1") for i in range(64)}
    with pytest.raises(ValueError, match=f"at most {header_module.MAX_HEADER_BYTES} bytes"):
        encode_page(record(planes=many))


def test_a_link_or_a_pipe_is_not_read(tmp_path):
    """A pipe would be waited for, a link may lead anywhere."""
    import os

    write_atomically(Files(), tmp_path / "page", encode_page(record()))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "page")
    data, size = Files().read(tmp_path / "page")
    assert len(data) == size and decode_page(data).key == record().key
    assert (tmp_path / "page").stat().st_mode & 0o077 == 0
    with pytest.raises(PageFileError, match="expected a regular file"):
        Files().read(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic links"):
        Files().read(tmp_path / "link")
    with pytest.raises(PageFileError, match="regular file"):
        Files().read(tmp_path)


def test_importing_the_package_needs_no_extra():
    import subprocess
    import sys

    code = """
import sys
import kvcompress_jax.storage.commands, kvcompress_jax.cli
assert "xxhash" not in sys.modules
from kvcompress_jax.storage import DiskTier, __all__
assert DiskTier.__module__ == "kvcompress_jax.storage.disk_tier" and "xxhash" in sys.modules
import kvcompress_jax.storage as storage
for name in __all__:
    getattr(storage, name)
assert not hasattr(storage, "Other")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
