"""Which layers ask vLLM for more memory, and that they share one plan all the same; no engine."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.interop.vllm import group
from kvcompress_jax.interop.vllm.backend import CompressedBackend
from kvcompress_jax.interop.vllm.floors import floor_names, with_floors
from kvcompress_jax.interop.vllm.model_files import Source
from kvcompress_jax.interop.vllm.platform import prepare_floors
from kvcompress_jax.interop.vllm.verify import verify

NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(6)]
FLOORS = [NAMES[0], NAMES[4]]
SOURCE = Source("nowhere")  # nothing is read of it
BLOCKS = 300


@pytest.fixture(params=["compact", "balanced"])
def recipe(request):
    return request.param


@pytest.fixture
def specs(recipe, tmp_path, monkeypatch):
    """What six layers ask for, of which two are floor layers."""
    file = tmp_path / "floors.toml"
    file.write_text(f'recipe = "{recipe}"\nfloor_layers = [0, -2, 4]\n')
    monkeypatch.setenv("KVCOMPRESS_CONFIG", str(file))
    monkeypatch.setattr(group, "GROUPS", [])
    stock = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    spec = CompressedBackend.customize_spec(stock)
    return with_floors(dict.fromkeys(NAMES, spec), dtype="bfloat16")


def test_floor_layers_ask_for_more(recipe, specs, monkeypatch):
    plain, floor = specs[NAMES[1]], specs[NAMES[0]]
    assert [name for name, spec in specs.items() if spec == floor] == FLOORS
    # 32 bytes per token and head: four more bits for half of the keys and values. In `balanced`
    # the others have three quarters of it.
    more = floor.state_content_bytes - plain.state_content_bytes
    assert more == (32 if recipe == "compact" else 8)
    assert floor.page_size_bytes - plain.page_size_bytes == 64 * 3 * more
    monkeypatch.setenv("VLLM_KV_COMPRESSION_LEVELS", "1")
    stock = FullAttentionSpec(block_size=64, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    assert with_floors(dict.fromkeys(NAMES, stock), dtype="bfloat16") == dict.fromkeys(NAMES, stock)


def test_both_kinds_of_layers_have_one_plan(specs):
    """As vLLM's runner does: a builder for each kind, each asked in each step."""
    engine = object()
    kinds = {spec: [n for n in NAMES if specs[n] == spec] for spec in specs.values()}
    groups = [
        group.group_of(engine, spec, SOURCE, names, dtype="bfloat16", blocks=BLOCKS)
        for spec, names in kinds.items()
    ]
    (made,) = group.GROUPS
    assert groups == [made, made]
    assert (made.states.layers, made.states.floors) == (6, 2)
    for name in NAMES:
        memory = torch.zeros(BLOCKS, specs[name].page_size_bytes, dtype=torch.uint8)
        assert made.memory(name, memory).carve.floor == (name in FLOORS)
    made.verify()
    total = BLOCKS * sum(spec.page_size_bytes for spec in specs.values())
    assert made.stats()["pool_bytes"] == total

    def ask(names, length):
        starts, tables = np.array([0, length - held]), np.arange(1, 4)[None]
        return made.plan(names[0], starts, np.array([length]), tables)

    one, other = kinds.values()
    held = 0
    step = ask(one, 150)
    assert ask(other, 150) is step
    held = 150
    after = ask(one, 151)
    assert after is not step and ask(other, 151) is after
    verify(made.states)
    held = 151
    ask(one, 152)
    with pytest.raises(RuntimeError, match=r"expected sequences of \[152\] tokens as in other"):
        ask(other, 153)
    # Layers that are bound again, or for another engine, begin anew.
    spec, names = next(iter(kinds.items()))
    memory = {"dtype": "bfloat16", "blocks": BLOCKS}
    assert group.group_of(engine, spec, SOURCE, names, **memory) is not made
    (again,) = group.GROUPS
    assert group.group_of(object(), spec, SOURCE, names, **memory) is not again
    with pytest.raises(RuntimeError, match=r"layers\.0.*: expected a KV cache of \d+ or \d+ bytes"):
        again.add(spec.copy_with_new_block_size(128), names)


@pytest.mark.parametrize(
    ("floors", "names", "message"),
    [
        ((6,), NAMES, r"floor_layers: expected -6 to 5, got \[6\]"),
        ((0, -7), NAMES, r"floor_layers: expected -6 to 5, got \[-7\]"),
        (
            range(6),
            NAMES,
            "expected some of 6 layers inside vLLM, got all of them: use seal_level=1",
        ),
        ((0,), NAMES[1:], "expected one cache in each of 5 layers, got"),
    ],
)
def test_floor_layers_that_cannot_be_are_refused(floors, names, message):
    config = CompressionConfig(seal_level=2, floor_layers=tuple(floors))
    with pytest.raises(ConfigError, match=message):
        floor_names(config, names)


CPU = "vllm.v1.worker.cpu_worker.CPUWorker"


def engine(pipeline, worker):
    parallel = SimpleNamespace(pipeline_parallel_size=pipeline, worker_cls=worker)
    return SimpleNamespace(parallel_config=parallel)


@pytest.mark.parametrize(
    ("pipeline", "worker", "message"),
    [
        (2, CPU, "pipeline_parallel_size: expected 1 with floor_layers, got 2"),
        (1, "theirs.Worker", r"worker_cls: expected one of \['vllm.*got theirs.Worker"),
    ],
)
def test_engines_that_cannot_have_floor_layers_are_refused(pipeline, worker, message):
    config = CompressionConfig(seal_level=2, floor_layers=(0,))
    with pytest.raises(ConfigError, match=message):
        prepare_floors(engine(pipeline, worker), config)
    prepare_floors(engine(pipeline, worker), CompressionConfig(seal_level=2))
    possible = engine(1, CPU)
    for _ in range(2):  # vLLM checks a configuration more than once
        prepare_floors(possible, config)
        assert possible.parallel_config.worker_cls.endswith(".worker_cpu.FloorCpuWorker")


def test_layers_of_several_shapes_are_refused(specs):
    with pytest.raises(ConfigError, match="floor_layers: expected full attention in layers alike"):
        with_floors(specs, dtype="bfloat16")
