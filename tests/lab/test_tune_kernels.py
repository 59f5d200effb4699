"""Tuning of the kernels' settings, with a clock that the test sets."""

import dataclasses
import json

import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.kernels.hadamard.cases import make_case
from kvcompress_jax.kernels.tuning import device_file, find_tuning, read_tuning
from kvcompress_jax.lab.tune_kernels import Tunable, case_seconds, store, tunables, tune

DEVICE = "NVIDIA H100 80GB HBM3"
SETTINGS = [{"num_warps": w, "num_stages": 1, "rows": 64} for w in (2, 4, 8)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCOMPRESS_TUNED_DIR", str(tmp_path))
    return tmp_path


def tunable(seen):
    def case(settings):
        seen.append(settings)
        return settings

    return Tunable(op="hadamard", shape="128", case=case, candidates=SETTINGS)


def test_the_fastest_is_stored_by_device_and_found_again(folder):
    default, seen = find_tuning("hadamard", "128"), []
    times = {2: 3.0, 4: 2.0, 8: 1.0}
    result = tune(tunable(seen), device=DEVICE, seconds=lambda s: times[s["num_warps"]])
    assert seen[0] == default
    assert (result.best["num_warps"], result.best_seconds, result.default_seconds) == (8, 1.0, 2.0)
    (file,) = store([result], device=DEVICE, folder=folder)
    assert file == folder / "hadamard" / "nvidia-h100-80gb-hbm3.json"
    assert find_tuning("hadamard", "128", DEVICE) == result.best
    assert find_tuning("hadamard", "64", DEVICE) == find_tuning("hadamard", "64")
    assert find_tuning("hadamard", "128", "NVIDIA A100") == default
    file.write_text(json.dumps({"64": SETTINGS[0]} | json.loads(file.read_text())))
    store([result], device=DEVICE, folder=folder)
    assert read_tuning(file) == {"64": SETTINGS[0], "128": result.best}


def test_what_fails_is_left_out_and_reported(folder):
    def seconds(settings):
        if settings["num_warps"] < 8:
            raise RuntimeError("spilled")
        return 1.0

    result = tune(tunable([]), device=DEVICE, seconds=seconds)
    assert result.best["num_warps"] == 8
    assert len(result.failed) == 2
    assert all("spilled" in reason for reason in result.failed)
    with pytest.raises(ValueError, match=r"^hadamard 128: no settings work: .*spilled"):
        tune(tunable([]), device=DEVICE, seconds=lambda settings: seconds({"num_warps": 1}))


def test_a_wrong_kernel_is_not_timed():
    case = make_case(64, "bfloat16", SETTINGS[1], vectors=64, interpret=True)
    assert case_seconds(case) > 0
    wrong = dataclasses.replace(case, reference=lambda x: x)
    with pytest.raises(ValueError, match=r"^hadamard/64/bfloat16: array 0: \d+ of 4096 numbers"):
        case_seconds(wrong)


def test_a_damaged_file_is_named(folder):
    file = folder / "hadamard" / device_file(DEVICE)
    file.parent.mkdir()
    for text in ("[]", '{"128": 3}', '{"128": {"num_warps": "4"}}', "{"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"hbm3\.json: expected a JSON object of shapes"):
            read_tuning(file)
        file.unlink()


def test_every_op_has_candidates_that_its_kernel_takes():
    found = {(x.op, x.shape): x for x in tunables()}
    assert {op for op, _ in found} == {
        "seal_page",
        "open_page",
        "hadamard",
        "decode_attention",
        "prefill_attention",
    }
    for (op, shape), x in found.items():
        assert len(x.candidates) >= 2, (op, shape)
        default = find_tuning(op, shape)
        assert all(candidate.keys() == default.keys() for candidate in x.candidates)
    with pytest.raises(NotImplementedError, match=r"^seal_page: expected one of .*, got 64x80$"):
        find_tuning("seal_page", "64x80")


def test_tune_without_a_gpu_says_so(capsys):
    assert main(["bench", "--tune"]) == 2
    error = capsys.readouterr().err
    assert error == "kvcompress bench: bench --tune needs a GPU, and JAX has only cpu here\n"


def test_bench_measures_the_codec_and_attention(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", "--quick", "--tokens", "128", "--repeats", "1", "--json", str(out)]
    assert main(command) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["recipe"] for row in rows] == ["safe", "balanced", "compact"]
    times = [value for row in rows for name, value in row.items() if "ms" in name]
    assert len(times) == 12
    assert all(0 < x < 1e5 for x in times)
    assert "SmolLM2-135M" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "--tokens", "100"])
    assert "expected at least 128, got 100" in capsys.readouterr().err
