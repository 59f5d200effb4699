"""Answers and perplexity of SmolLM2 in vLLM, beside vLLM as it is. In float32: in bfloat16 vLLM
does not agree with itself when it batches otherwise."""

from pathlib import Path

import pytest

from tests.vllm.agreement import agreement

SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
ANSWERS = {"answers": True}


def test_one_level_is_stock_token_by_token(drive):
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    raw = drive("quality", ANSWERS, VLLM_KV_COMPRESSION_LEVELS="1", **SPACE)
    assert sum(map(len, stock["greedy"])) == 20 * 64
    assert raw["greedy"] == stock["greedy"]
    assert raw["loss"] == pytest.approx(stock["loss"], abs=1e-5)
    assert raw["stats"]["seals"] == 0
    # The judge can say no: prompts in another order.
    assert raw["greedy"][1:] != stock["greedy"][:-1]
    beside("raw, answers", raw["greedy_seconds"], stock["greedy_seconds"])
    beside("raw, text", raw["loss_seconds"], stock["loss_seconds"])


@pytest.mark.parametrize(("recipe", "bound"), [("balanced", 1.005), ("compact", 1.015)])
def test_perplexity_stays(drive, recipe, bound):
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    ours = drive("quality", KVCOMPRESS_RECIPE=recipe, **SPACE)
    assert ours["tokens"] == stock["tokens"] >= 2000
    ratio = ours["perplexity"] / stock["perplexity"]
    print(f"{recipe}: perplexity {ours['perplexity']:.3f}, stock {stock['perplexity']:.3f}")
    beside(f"{recipe}, text", ours["loss_seconds"], stock["loss_seconds"])
    assert ratio < bound
    assert ours["loss"] != stock["loss"] and ours["stats"]["seals"] > 20  # it did compress


def test_a_calibrated_code_holds_more_and_loses_less(drive, profile):
    """3.5 bits, on a text of the kind that it was fitted to, beside 4 bits without calibration."""
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    compact = drive("quality", KVCOMPRESS_RECIPE="compact", **SPACE)
    ours = drive("quality", KVCOMPRESS_PROFILE=str(profile), **SPACE)
    near, far = (distance(found["losses"], stock["losses"]) for found in (ours, compact))
    print(f"nats from stock: {near:.5f} calibrated, {far:.5f} with compact")
    print(f"perplexity {ours['perplexity']:.3f}, stock {stock['perplexity']:.3f}")
    print(f"tokens that fit: {ours['capacity']}, with compact {compact['capacity']}")
    assert ours["tokens"] == stock["tokens"] and 0 < near < 1.1 * far
    assert ours["perplexity"] / stock["perplexity"] < 1.015
    stats = ours["stats"]
    assert stats["blocks_level_3"] > 0 == stats["blocks_level_1"] == stats["blocks_level_2"]
    assert stats["effective_bits"] < 3.55 and compact["stats"]["effective_bits"] > 4.5
    assert ours["capacity"] > 1.2 * compact["capacity"]
    beside("calibrated, text", ours["loss_seconds"], stock["loss_seconds"])


def test_error_feedback_loses_less_in_the_same_bytes(drive):
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    nearest = drive("quality", KVCOMPRESS_RECIPE="compact", **SPACE)
    fed = {"KVCOMPRESS_RECIPE": "compact", "KVCOMPRESS_ERROR_FEEDBACK": "1"}
    ours = drive("quality", **fed, **SPACE)
    near, far = (distance(found["losses"], stock["losses"]) for found in (ours, nearest))
    print(f"nats from stock: {near:.5f} with error feedback, {far:.5f} without")
    assert 0 < near < 0.9 * far
    assert ours["capacity"] == nearest["capacity"]
    assert ours["stats"]["effective_bits"] == nearest["stats"]["effective_bits"]
    beside("compact with feedback, text", ours["loss_seconds"], stock["loss_seconds"])


def test_floor_layers_are_nearly_stock(drive, tmp_path):
    """All layers but one never go below level 1, and that level is 8 bits for all tokens."""
    layers = [*range(14), *range(-15, 0)]  # of 30, all but 14
    file = tmp_path / "floors.toml"
    file.write_text(f'recipe = "compact"\nratio = 1.0\nfloor_layers = {layers}\n')
    settings = {"KVCOMPRESS_CONFIG": str(file), "VLLM_KV_COMPRESSION_RAW_SHARE": "0.35"}
    ours = drive("floors", {"options": {"cpu_bytes_to_use": 200 << 20}}, **settings)
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    compact = drive("quality", KVCOMPRESS_RECIPE="compact", **SPACE)
    near, far = (distance(found["losses"], stock["losses"]) for found in (ours, compact))
    print(f"nats from stock: {near:.5f} with floor layers, {far:.5f} with compact")
    assert len(ours["losses"]) > 1000 and 0 < near < far / 3
    # What it takes: 4 bits more in 29 of 30 layers, inside the memory that vLLM was given.
    stats = ours["stats"]
    more = stats["effective_bits"] - compact["stats"]["effective_bits"]
    assert stats["floor_layers"] == 29 and more == pytest.approx(4 * 29 / 30)
    assert 0.99 < stats["pool_bytes"] / (100 << 20) <= 1
    assert (
        stats["capacity_tokens"] == ours["capacity"] > 2.9 * stats["uncompressed_capacity_tokens"]
    )
    # Sealed blocks that are found again answer as those that were never away.
    device, host, anew = ours["answers"]
    assert ours["hits"] == [2 * 448, 0, 0] and ours["loads"] == [0, 14, 14]
    # Where prompts are computed anew, their ends attend to raw pages: a near tie may end one of the
    # two answers early, not both.
    for one, other in ((device, host), (device, anew), (host, anew)):
        assert agreement(one, other) >= 0.5 and any(a == b for a, b in zip(one, other, strict=True))
    assert agreement(device[::-1], anew) < 0.2  # the judge can say no


def distance(one, other):
    """Mean difference of the losses of the tokens that both have."""
    pairs = list(zip(one, other, strict=False))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.long
def test_compiled_by_inductor(drive):
    """vLLM's default: everything but attention is compiled. The rest of the suite is eager."""
    compiled = {"eager": False}
    stock = drive("quality", compiled, compress=False, **SPACE)
    raw = drive("quality", compiled, VLLM_KV_COMPRESSION_LEVELS="1", **SPACE)
    ours = drive("quality", compiled, KVCOMPRESS_RECIPE="balanced", **SPACE)
    eager = drive("quality", KVCOMPRESS_RECIPE="balanced", **SPACE)
    for found in (stock, raw, ours):
        assert found["compiled"][1] == "inductor", found["compiled"]
    assert eager["compiled"][0] == "NONE"
    assert raw["loss"] == pytest.approx(stock["loss"], abs=1e-4)
    assert ours["loss"] == pytest.approx(eager["loss"], abs=1e-3)
    assert ours["loss"] != raw["loss"] and ours["stats"]["seals"] > 20  # it did compress
    assert ours["perplexity"] / stock["perplexity"] < 1.005
    beside("balanced, text, compiled", ours["loss_seconds"], stock["loss_seconds"])


def test_in_tree_fp8_beside(drive):
    """Not ours, and no bound of ours: what users would have without us."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's fp8 cache on CPUs needs AVX-512")
    stock = drive("quality", ANSWERS, compress=False, **SPACE)
    fp8 = drive("quality", {"kv_cache_dtype": "fp8"}, compress=False, **SPACE)
    print(f"fp8: perplexity {fp8['perplexity']:.3f}, stock {stock['perplexity']:.3f}")
    beside("fp8, text", fp8["loss_seconds"], stock["loss_seconds"])
    assert 0.9 < fp8["perplexity"] / stock["perplexity"] < 1.2
    assert fp8["loss"] != stock["loss"]


def beside(what, ours, stock):
    """As it is: the suite's machine does other work as well."""
    print(f"{what}: {ours:.1f} s, stock {stock:.1f} s")
