"""The host's plans alone, over many steps: no pool runs out below the scheduler's limit."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.interop.vllm.blocks import BlockStates
from kvcompress_jax.interop.vllm.carve import carve_layers, layer_layout
from kvcompress_jax.interop.vllm.verify import verify

PAGE, BLOCKS = 16, 400


class Nothing:
    """Layers that need not do anything."""

    def seal(self, seals):
        pass

    def drop_sinks(self, block, chunk, slot):
        pass

    def save_fine(self, chunk):
        return [np.zeros(1)]

    def load_fine(self, chunk, saved):
        pass


@pytest.mark.parametrize("window", [0, 16, 64])
@pytest.mark.parametrize("fine_share", [0.1, 0.75])
def test_two_raw_pages_are_enough_for_a_sequence(window, fine_share):
    """What the scheduler's limit counts on, with chunks of prompts for many sequences at a time,
    sequences that end, and blocks that others take."""
    config = CompressionConfig(page_size=PAGE, window_tokens=window, host_bytes=1 << 14)
    layout = layer_layout(config, heads=2, dim=32, dtype="float32")
    carves = carve_layers(config, layout, blocks=BLOCKS, raw_share=0.3, fine_share=fine_share)
    states, random = BlockStates(carves, config, layers=1), np.random.default_rng(0)
    free, sequences = list(range(BLOCKS - 1, 0, -1)), []  # (tokens, blocks)
    for _ in range(60):
        while len(sequences) < states.raw.capacity // 2:
            sequences.append([0, []])
        starts = [0]
        for sequence in sequences:
            count = int(random.choice([1, 1, 1, 5, 40, 70]))
            sequence[0] += count
            starts.append(starts[-1] + count)
            while len(sequence[1]) * PAGE < sequence[0]:
                sequence[1].append(free.pop())
        tables = np.zeros((len(sequences), max(len(b) for _, b in sequences)), np.int32)
        for r, (_, blocks) in enumerate(sequences):
            tables[r, : len(blocks)] = blocks
        lengths = np.array([n for n, _ in sequences])
        states.plan(np.array(starts), lengths, tables, Nothing())
        verify(states)
        for sequence in list(sequences):
            if sequence[0] > 200 or random.random() < 0.05:
                free[:0] = sequence[1]
                sequences.remove(sequence)
    counts = states.counters
    assert counts.seals > 500 and counts.demotions > 500 and counts.reused > 100
    assert (counts.early_seals > 0) == (window > 0)
