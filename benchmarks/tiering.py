"""Which pages should keep their fine planes: policies on the real manager, with simulated traffic.

    .venv/bin/python benchmarks/tiering.py
    .venv/bin/python benchmarks/tiering.py --traffic chats --steps 2000

Prints, for every traffic and policy, what share of the attention mass met pages at level 0, 1 and
2, how much of the prompts was found in the prefix cache, and how often pages changed their level.
The manager is the one that serves models; attention is a model of attention (`traffic.py`).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager, OutOfPagesError
from kvcompress_jax.paged import PoolSizes
from kvcompress_jax.paged.transfer import RawImage

sys.path.insert(0, str(Path(__file__).parent))
from traffic import TRAFFIC, Turn, turns

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
CHUNK = 256
SEQUENCES = 12
DECAY = 0.95  # of heat, in a step


class SimulatedDevice:
    """Keeps heat as the device does, and nothing else: every seal succeeds, copies are empty."""

    def __init__(self, layout, sizes):
        self.heat_of = np.zeros(sizes.sealed_pages, np.float32)
        self._all = np.ones(sizes.sealed_pages, bool)
        self._plane = (2, KV_HEADS, layout.fine_rows * HEAD_DIM // 2)
        raw = (1, layout.uncompressed_page_bytes)
        self._raw = np.broadcast_to(np.uint8(0), raw)

    def apply(self, cache, plan):
        if plan.seals is not None:
            self.heat_of[plan.seals.page[: int(plan.seals.count)]] = 0
        return cache, None if plan.seals is None else self._all[plan.seals.page]

    def sealed(self, cache):
        return self._all

    def fine_planes(self, cache, chunks):
        return np.broadcast_to(np.uint8(0), (len(chunks), *self._plane))

    def export_raw(self, cache, raw):
        nothing = np.zeros(0)
        return RawImage(np.broadcast_to(self._raw, (len(raw), *self._raw.shape)), nothing, nothing)

    def restore_raw(self, cache, raw, image):
        return cache

    def heat(self, cache):
        return self.heat_of.copy()


class Policy:
    """Ours: demote what has the least decayed attention mass, promote what has most of it."""

    promotes_on_use = False
    promote_heat = 2.0

    def __init__(self):
        self.manager: KVCacheManager | None = None

    def coldness(self, pages):
        return -self.manager.store.heat[pages]

    def used(self, pages, step):
        """Sealed pages that a sequence attended to."""

    def sealed(self, page, importance):
        """A page was sealed; how much attention it had in the window."""


class LeastRecentlyUsed(Policy):
    """Demote what was not attended to for the longest time; promote what is used again."""

    promotes_on_use = True
    promote_heat = 1e30

    def __init__(self):
        super().__init__()
        self.last: dict[int, int] = {}

    def coldness(self, pages):
        holder = self.manager.store.holder
        return np.array([-self.last.get(holder[i].uid, 0) for i in pages], np.float64)

    def used(self, pages, step):
        for page in pages:
            self.last[page.uid] = step


class FirstInFirstOut(Policy):
    """Demote what was sealed first."""

    promotes_on_use = True
    promote_heat = 1e30

    def coldness(self, pages):
        return -self.manager.store.uid[pages].astype(np.float64)


class ImportanceOnly(Policy):
    """Demote what got the least attention before it was sealed, whatever it gets since."""

    promotes_on_use = True
    promote_heat = 1e30

    def __init__(self):
        super().__init__()
        self.importance: dict[int, float] = {}

    def coldness(self, pages):
        holder = self.manager.store.holder
        return np.array([-self.importance.get(holder[i].uid, 0.0) for i in pages])

    def sealed(self, page, importance):
        self.importance[page.uid] = importance


POLICIES = {
    "ours": Policy,
    "least recently used": LeastRecentlyUsed,
    "first in, first out": FirstInFirstOut,
    "importance only": ImportanceOnly,
}


class Server:
    """A serving loop without a model."""

    def __init__(self, policy: Policy, *, refined: float, seed: int):
        """
        Args:
          policy: of levels.
          refined: share of the sealed pages that there are fine chunks for.
          seed: of the attention.
        """
        self.policy, self.random = policy, np.random.default_rng(seed)
        config = CompressionConfig(
            host_bytes=1 << 30, prefix_cache_bytes=1 << 34, promote_heat=policy.promote_heat
        )
        sealed = 700
        sizes = PoolSizes(
            raw_pages=SEQUENCES * 4 + CHUNK // config.page_size,
            sealed_pages=sealed,
            fine_chunks=int(sealed * LAYERS * refined),
            sink_slots=100,
        )
        layout = config.layout(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        self.device = SimulatedDevice(layout, sizes)
        self.manager = policy.manager = KVCacheManager(
            layout,
            sizes,
            config,
            max_sequences=SEQUENCES,
            device=self.device,
            coldness=policy.coldness,
        )
        self.mass = np.zeros(3)  # met at level 0, 1, 2
        self.latent: dict[int, float] = {}  # of pages
        self.prompt_tokens = self.served = self.step_number = 0
        self.running: list[tuple[int, Turn, int]] = []  # sequence, turn, tokens that are left

    def admit(self, turn: Turn) -> bool:
        """Feeds a prompt; False when there is no room now for it and all who run, to the end."""
        manager = self.manager
        need = sum(t.pages for _, t, _ in self.running) + turn.pages
        if need > manager.sealed.capacity:
            return False
        try:
            sequence, _ = manager.add_prompt(self, turn.prompt, step_tokens=CHUNK)
        except OutOfPagesError:
            return False
        if self.policy.promotes_on_use:
            manager.promote_pages(sequence, range(len(turn.prompt)))
        self.prompt_tokens += len(turn.prompt)
        fed = manager.length(sequence)
        while fed < len(turn.prompt):
            manager.advance(self)
            if fed:
                manager.remember(sequence, turn.prompt[:fed], self)
            count = min(CHUNK, len(turn.prompt) - fed)
            manager.append_slots(sequence, count)
            fed += count
        self.running.append((sequence, turn, turn.answer))
        return True

    def step(self) -> None:
        """Everybody that runs gets a token."""
        manager, self.step_number = self.manager, self.step_number + 1
        manager.advance(self)
        manager.append_step([sequence for sequence, _, _ in self.running])
        self.device.heat_of *= DECAY
        left = []
        for sequence, turn, count in self.running:
            self.attend(sequence, turn)
            if count > 1:
                left.append((sequence, turn, count - 1))
            else:
                manager.free(sequence)
                self.served += 1
        self.running = left

    def attend(self, sequence: int, turn: Turn) -> None:
        """Spreads the attention of one token over the pages of its sequence."""
        pages = self.manager.sequences[sequence].pages
        for page in pages:
            if page.uid not in self.latent:
                self.latent[page.uid] = float(self.random.lognormal(0.0, 1.2))
                self.policy.sealed(page, self.latent[page.uid] * self.random.lognormal(0.0, 0.5))
        weight = np.array([self.latent[p.uid] for p in pages])
        weight *= turn.relevance(len(pages))
        weight[0] += weight.sum() / 2  # the first tokens
        weight /= weight.sum()
        sealed = np.array([p.sealed for p in pages])
        coded = sealed >= 0
        np.add.at(self.device.heat_of, sealed[coded], weight[coded])
        level = np.array([0 if p.pending else p.level for p in pages])
        self.mass += np.bincount(level, weights=weight, minlength=3)[:3]
        self.policy.used([p for p in pages if p.sealed >= 0], self.step_number)


def simulate(traffic: str, policy: str, *, steps: int, refined: float, seed: int) -> dict:
    """Figures of one run."""
    server = Server(POLICIES[policy](), refined=refined, seed=seed)
    coming = turns(TRAFFIC[traffic], steps, seed=seed)
    waiting: list[Turn] = []
    for now in range(steps):
        waiting += coming.pop(now, [])
        while waiting and len(server.running) < SEQUENCES and server.admit(waiting[0]):
            waiting.pop(0)
        server.step()
    manager, counts = server.manager, server.manager.counters
    share = server.mass / server.mass.sum()
    stats = manager.get_compression_stats()
    return {
        "traffic": traffic,
        "policy": policy,
        "mass at level 0": share[0],
        "mass at level 1": share[1],
        "mass at level 2": share[2],
        "prompt tokens found": counts.prefix_hit_tokens / max(server.prompt_tokens, 1),
        "changes per 1,000 steps": 1000 * (counts.promotions + counts.demotions) / steps,
        "device MB": stats["allocated_bytes"] / 1e6,
        "turns served": server.served,
    }


def main() -> None:
    """Simulates and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traffic", choices=sorted(TRAFFIC), action="append")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--refined", type=float, default=0.3, help="chunks per sealed page")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        simulate(
            traffic, policy, steps=arguments.steps, refined=arguments.refined, seed=arguments.seed
        )
        for traffic in arguments.traffic or sorted(TRAFFIC)
        for policy in POLICIES
    ]
    if arguments.json:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = []
        for name, value in row.items():
            if isinstance(value, float):
                share = name.startswith(("mass", "prompt"))
                value = f"{100 * value:.1f} %" if share else f"{value:.0f}"
            cells.append(str(value))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
