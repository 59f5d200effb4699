"""Tuning of the kernels' settings, with a clock that the test sets."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from kvcompress_jax.cli import main
from kvcompress_jax.kernels.hadamard.cases import make_case
from kvcompress_jax.kernels.tuning import device_file, find_tuning, read_tuning
from kvcompress_jax.lab.case_timing import Measured, measure_cases
from kvcompress_jax.lab.kernel_timing import Repeated
from kvcompress_jax.lab.tune_kernels import Tunable, store, tunables, tune

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


def clock(times):
    """A measure of settings, by their number of warps; what has no time failed."""

    def measure(cases):
        for settings in cases:
            took = times.get(settings["num_warps"])
            yield Measured(case=settings, wrong=None if took else "spilled", seconds=took)

    return measure


def test_the_fastest_is_stored_by_device_and_found_again(folder):
    default, seen = find_tuning("hadamard", "128"), []
    times = {2: 3.0, 4: 2.0, 8: 1.0}
    result = tune(tunable(seen), device=DEVICE, measure=clock(times))
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
    result = tune(tunable([]), device=DEVICE, measure=clock({8: 1.0}))
    assert result.best["num_warps"] == 8
    assert len(result.failed) == 2
    assert all("spilled" in reason for reason in result.failed)
    with pytest.raises(ValueError, match=r"^hadamard 128: no settings work: .*spilled"):
        tune(tunable([]), device=DEVICE, measure=clock({}))


def test_a_wrong_kernel_is_not_timed():
    case = make_case(64, "bfloat16", SETTINGS[1], vectors=64, interpret=True)
    wrong = dataclasses.replace(case, name="wrong", reference=lambda x: x)

    def broken(x):
        raise NotImplementedError("too wide")

    refused = dataclasses.replace(case, build=lambda: (broken, case.build()[1]))
    right, other, none = measure_cases([case, wrong, refused], references=True)
    assert right.wrong is None and right.seconds > 0 and right.reference_seconds > 0
    assert re.match(r"array 0: \d+ of 4096 numbers", other.wrong) and other.seconds is None
    assert none.wrong == "NotImplementedError: too wide" and none.seconds is None
    assert [x.seconds for x in measure_cases([case], timed=False)] == [None]
    with pytest.raises(ValueError, match="hadamard/64/bfloat16: expected an example"):
        list(measure_cases([dataclasses.replace(case, example=None)]))


@pytest.mark.parametrize("donate", [False, True])
def test_calls_in_one_program_are_all_made(donate):
    """The argument that is updated shows how often; what does not change is not left out."""
    count = jax.ShapeDtypeStruct((4,), jnp.int32)

    def step(x, y):
        return x + y, x * y

    loop = Repeated(step, (count, count), donate=(0,) if donate else (), calls=5)
    loop.program.compile()
    arguments = (jnp.zeros(4, jnp.int32), jnp.ones(4, jnp.int32))
    assert loop.seconds(arguments, repeats=2) > 0
    assert arguments[0].tolist() == [0] * 4
    fixed = [() if donate else arguments[0], arguments[1]]
    updated = arguments[0].copy() if donate else ()
    last = tuple(jnp.zeros(4, jnp.int32) for _ in range(1 if donate else 2))
    updated, last = loop.program(fixed, updated, last)
    assert (updated if donate else last[0]).tolist() == [5 if donate else 1] * 4
    with pytest.raises(ValueError, match="donate: expected at most one argument, got 2"):
        Repeated(step, (count, count), donate=(0, 1), calls=5)


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
