"""`kvcompress inspect` and `kvcompress scrub` as an operator meets them."""

import json
import os

import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.storage.disk_tier import DiskTier
from kvcompress_jax.storage.files import Files, write_atomically
from kvcompress_jax.storage.folder import file_name
from kvcompress_jax.storage.page_file import decode_page, encode_page
from tests.storage.pages import planes, record


def run(capsys, *argv):
    """Exit code and what was printed to either stream."""
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def write(folder, page, name=None):
    path = folder / (name or file_name(page.key))
    write_atomically(Files(), path, encode_page(page, compression=3), durable=False)
    return path


def test_inspect(capsys, tmp_path):
    """kvcompress inspect FILE"""
    path = write(tmp_path, record(key=b"\x01\x02"))
    code, shown, error = run(capsys, "inspect", path)
    assert (code, error) == (0, "")
    for part in (
        *(
            "model:       tiny-model",
            "codec:       embedded-16",
            "level:       2",
            "key:         0102",
        ),
        *(
            f"tokens_hash: {bytes(range(32)).hex()}",
            "base ",
            "uint8[2, 2, 16, 8]",
            "bfloat16[2, 8]",
        ),
        "every byte is right",
    ):
        assert part in shown, part
    code, shown, _ = run(capsys, "inspect", path, "--json")
    found = json.loads(shown)
    assert code == 0 and found["fault"] is None and found["file_bytes"] == path.stat().st_size
    assert {p["name"]: p["bytes"] for p in found["planes"]} == {
        name: x.nbytes for name, x in planes().items()
    }


def test_inspect_a_file_that_is_not_right(capsys, tmp_path):
    path = write(tmp_path, record())
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\xff")
    code, shown, _ = run(capsys, "inspect", path)
    assert code == 1 and "corrupted: plane order: expected bytes of its checksum" in shown
    assert "model:       tiny-model" in shown and "every byte" not in shown
    path.write_bytes(b"something else")
    code, shown, _ = run(capsys, "inspect", path, "--json")
    assert code == 1 and json.loads(shown)["fault"] == "foreign"
    code, shown, _ = run(capsys, "inspect", tmp_path / "missing")
    assert code == 1 and "unreadable: No such file" in shown


@pytest.fixture
def folder(tmp_path):
    """Three good pages, and one file of every kind that is not right."""
    for i in range(3):
        write(tmp_path, record(i, level=1 + i % 2))
    data = {}
    for i, fault in enumerate(("corrupted", "truncated", "version", "foreign")):
        path = write(tmp_path, record(10 + i))
        data[fault] = path.read_bytes()
        path.write_bytes(
            {
                "corrupted": data[fault][:-9] + b"!" + data[fault][-8:],
                "truncated": data[fault][:-9],
                "version": data[fault][:8] + b"\x09" + data[fault][9:],
                "foreign": b"PK" + data[fault],
            }[fault]
        )
    write(tmp_path, record(20), name="copy.kvpage")
    (tmp_path / "notes.txt").write_text("not a page, and not ours")
    (tmp_path / ".x.kvpage.1.tmp").write_bytes(b"never finished")
    os.mkfifo(tmp_path / "pipe.kvpage")
    return tmp_path


def test_scrub(capsys, folder):
    """kvcompress scrub DIR, and --delete"""
    names = sorted(os.listdir(folder))
    code, shown, error = run(capsys, "scrub", folder)
    assert (code, error) == (1, "")
    assert "3 pages are right" in shown and "3 of model and code tiny-model embedded-16" in shown
    assert "2 at level 1" in shown and "1 unfinished" in shown and "deleted" not in shown
    for fault in ("corrupted", "truncated", "version", "foreign", "misnamed"):
        assert f": {fault}: " in shown
    assert sorted(os.listdir(folder)) == names

    code, shown, _ = run(capsys, "scrub", folder, "--delete", "--json")
    report = json.loads(shown)
    assert code == 1 and report["pages"] == 3 and report["unfinished"] == 1
    gone = {b["fault"] for b in report["bad"] if b["deleted"]}
    assert gone == {"corrupted", "truncated", "version", "foreign"}
    # What has other names is somebody else's, and what has right bytes is worth something.
    left = {file_name(record(i).key) for i in range(3)} | {"copy.kvpage", "notes.txt", ".lock"}
    assert set(os.listdir(folder)) == left
    for i in range(3):
        decode_page((folder / file_name(record(i).key)).read_bytes())

    (folder / "copy.kvpage").unlink()
    (folder / "notes.txt").unlink()
    assert run(capsys, "scrub", folder)[0] == 0


def test_the_tier_skips_what_scrub_reports(folder, caplog):
    tier = DiskTier(folder, 1 << 20, model="tiny-model", codec="embedded-16")
    assert len(tier) == 4  # a damaged plane is found when it is read
    assert "skipped 6 of 10 files: 3 foreign, 1 misnamed, 1 truncated, 1 version" in caplog.text
    assert tier.stats().skipped == 6
    assert tier.load(record(10).key, timeout_s=30) is None and tier.stats().damaged == 1
    assert len(tier) == 3
    tier.close()


def test_scrub_does_not_disturb_a_tier_at_work(capsys, tmp_path):
    tier = DiskTier(tmp_path, 1 << 20, model="m", codec="c")
    tier.put(b"a", planes())
    tier.flush(timeout_s=30)
    assert run(capsys, "scrub", tmp_path)[0] == 0
    code, _, error = run(capsys, "scrub", tmp_path, "--delete")
    assert code == 2 and "expected it for us alone, another tier uses it" in error
    tier.close()
    assert run(capsys, "scrub", tmp_path, "--delete")[0] == 0


def test_mistakes(capsys, tmp_path):
    for argv in (["scrub", tmp_path / "no"], ["scrub", tmp_path / "no", "--delete"]):
        code, _, error = run(capsys, *argv)
        assert code == 2 and error.count("\n") == 1 and "expected a folder" in error
    assert not (tmp_path / "no").exists()
