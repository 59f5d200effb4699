"""Prompts that vLLM forgot come back from host memory and from a folder."""

import struct

import pytest

from tests.vllm.agreement import agreement

# Four prompts of five whole blocks, and one of the first two of them, of which the second is
# computed again. The first one may have come with the other prompt, and that with the second.
PAGES = range(19, 22)
PREFIX = "vllm:kv_compression_offload_"
MIB = 1 << 20
HOST = {"cpu_bytes_to_use": 200 * MIB}
# Without codes, what comes back is what left, and in float32 answers are the same token by token.
EXACT = {"VLLM_KV_COMPRESSION_LEVELS": "1"}
SMALL = {"VLLM_KV_COMPRESSION_RAW_SHARE": "0.35"}
SAFE, COMPACT = ({"KVCOMPRESS_RECIPE": r} | SMALL for r in ("safe", "compact"))


def figure(found, name):
    return found["metrics"].get(PREFIX + name, 0)


def test_what_vllm_forgot_is_in_host_memory(drive):
    found = drive("offload", {"options": HOST}, **EXACT)
    first, second = found["answers"]
    assert second == first
    assert found["loads"][0] == 0 and found["loads"][1] in PAGES
    assert figure(found, "hits") == found["loads"][1]
    assert figure(found, "host_bytes") > 20 * 30 * 2 * 3 * 64 * 64 * 4
    # The judge can say no: the prompts differ.
    assert turned(first) != first


def test_compressed_pages_come_back_and_another_code_does_not_use_them(drive, tmp_path):
    options = HOST | {"disk_path": str(tmp_path), "disk_bytes": 400 * MIB}
    found = drive("offload", {"options": options, "rounds": 3}, **SAFE)
    first, second, third = found["answers"]
    # A block that was still raw when it left is coded when it comes back: 8 bits for all tokens.
    assert agreement(second, first) > 0.8
    assert agreement(second, turned(first)) < 0.2
    assert third == second
    assert found["loads"][2] in range(2 * PAGES.start, 2 * PAGES.stop)
    assert figure(found, "bytes_saved") > 0.6 * figure(found, "host_bytes")
    other = drive("offload", {"options": options, "rounds": 0}, **COMPACT)
    assert figure(other, "skipped") == figure(found, "disk_pages") == 20
    assert figure(other, "disk_pages") == 0


def test_pages_of_a_calibrated_code_come_back(drive, profile, tmp_path):
    options = HOST | {"disk_path": str(tmp_path), "disk_bytes": 400 * MIB}
    coded = {"KVCOMPRESS_PROFILE": str(profile)} | SMALL
    found = drive("offload", {"options": options, "rounds": 3}, **coded)
    first, second, third = found["answers"]
    assert agreement(second, first) > 0.7  # a block that was raw when it left is coded now
    assert agreement(second, turned(first)) < 0.2
    assert third == second
    assert found["loads"][2] in range(2 * PAGES.start, 2 * PAGES.stop)
    again = drive("offload", {"options": options, "rounds": 1}, anew=True, **coded)
    assert figure(again, "disk_hits") in PAGES and figure(again, "skipped") == 0
    other = drive("offload", {"options": options, "rounds": 0}, **COMPACT)
    assert figure(other, "skipped") == 20


def test_a_restart_and_a_folder_that_somebody_damaged(drive, tmp_path):
    options = HOST | {"disk_path": str(tmp_path), "disk_bytes": 400 * MIB}
    first = drive("offload", {"options": options, "rounds": 1}, **EXACT)
    (answers,) = first["answers"]
    files = sorted(tmp_path.glob("*.kvpage"))
    assert len(files) == figure(first, "disk_pages") == 20

    again = drive("offload", {"options": options}, **EXACT)
    assert again["answers"] == [answers] * 2  # of an engine that never computed these prompts
    assert again["loads"][0] in PAGES
    assert figure(again, "disk_hits") in PAGES and figure(again, "skipped") == 0

    data = files[0].read_bytes()
    files[0].write_bytes(data[: len(data) // 2])
    files[1].write_bytes(b"not a page of keys and values")
    data = bytearray(files[2].read_bytes())
    data[8:10] = struct.pack("<H", 9)  # of another version of the format
    files[2].write_bytes(data)
    for file in files[3:]:  # one bit each
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
    damaged = drive("offload", {"options": options, "rounds": 1}, anew=True, **EXACT)
    assert damaged["answers"] == [answers]
    assert figure(damaged, "skipped") == 3
    assert figure(damaged, "damaged") > 0 and figure(damaged, "hits") == 0
    assert "skipped 3 of 20 files: 1 foreign, 1 truncated, 1 version" in damaged["log"]
    assert "dropped, it cannot be read: plane raw: expected bytes of its" in damaged["log"]


def turned(answers):
    """Of other prompts."""
    return [*answers[1:], answers[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cpu_bytes_to_use: expected bytes of host memory, got 0"),
        (HOST | {"disk_path": "x"}, "disk_path and disk_bytes: expected both or none"),
        (HOST | {"blocks_per_chunk": 2}, "kv_connector_extra_config: expected"),
        (HOST | {"spec_name": "CPUOffloadingSpec"}, "KV connector other than"),
    ],
    ids=["no memory", "half a disk", "unknown", "another spec"],
)
def test_options_that_cannot_be_are_refused(drive, options, message):
    assert message in drive("offload", {"options": options}, fails=True, **EXACT)
