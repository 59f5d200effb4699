"""What is installed is what is in the tree, and importing it is cheap."""

import re
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import kvcompress_jax
from tests.models.smollm2 import smollm2_file

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path | str = "/") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_packages_are_the_folders():
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "kvcompress_jax").rglob("__init__.py")
    }
    kernels = {
        ".".join(("kvcompress_jax", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "kernels").rglob("__init__.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders | kernels), "list every folder in pyproject.toml"


def test_version():
    assert PROJECT["project"]["version"] == kvcompress_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{kvcompress_jax.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_import_needs_neither_torch_nor_vllm_and_is_quick():
    code = """
import sys, time
import jax, jax.numpy
start = time.process_time()  # of this process: others may keep the cores busy
import kvcompress_jax, kvcompress_jax.paged, kvcompress_jax.manager, kvcompress_jax.transforms
print(time.process_time() - start, *[m for m in sys.modules if "." not in m])
"""
    seconds, modules = [], set()
    for _ in range(3):
        first, *names = python(code).split()
        seconds.append(float(first))
        modules |= set(names)
    assert statistics.median(seconds) < 1
    assert "kvcompress_jax" in modules
    heavy = {"torch", "vllm", "flax", "transformers", "gguf", "rich", "matplotlib"}
    assert not modules & (heavy | {"xxhash", "prometheus_client"})


def test_import_has_no_side_effects_on_jax():
    python("import kvcompress_jax.paged, jax; assert not jax._src.xla_bridge._backends")


def test_kernels_refuse_to_be_top_level():
    """Another project's package has that name."""
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert "kernels: expected to be imported as kvcompress_jax.kernels" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(  # a source distribution, and the wheel from that
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_everything_and_nothing_at_top_level(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kvcompress_jax", f"kvcompress_jax-{kvcompress_jax.__version__}.dist-info"}
    packaged = {name for name in names if name.endswith((".py", ".cc", ".h"))}
    sources = [p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".py", ".cc", ".h")]
    tree = {f"kvcompress_jax/{p.relative_to(ROOT)}" for p in sources}
    tree |= {str(p.relative_to(ROOT)) for p in (ROOT / "kvcompress_jax").rglob("*.py")}
    assert packaged == tree
    assert "kvcompress_jax/py.typed" in names
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import kvcompress_jax, kvcompress_jax.kernels
from kvcompress_jax.cli import main
print(kvcompress_jax.__file__)
try:
    main(["--help"])
except SystemExit as e:
    assert e.code == 0
"""
    out = python(code, tmp_path)
    assert out.startswith(str(tmp_path))
    assert "demo" in out
    assert "eval" in out


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


# Where each command of the README is run, and by which words.
RUN_BY = {
    "make demo": (".ci/run", "--silent demo "),
    "make test": (".ci/run", "--silent test "),
    "make test-vllm": (".ci/run", "--silent test-vllm "),
    "make lint": (".ci/run", "--silent lint "),
    "make bench": (".ci/run", "--silent bench "),
    # Minutes, in an environment of its own; what it runs, on tiny shapes.
    "make peers": ("tests/benchmarks/test_peers.py", "def test_a_run_writes_both_files("),
    "make gpu-gate": (".ci/run", "--silent gpu-gate "),
    # Minutes to an hour on the real model; on a tiny one, what the targets run.
    "make fidelity": ("tests/benchmarks/test_fidelity.py", "fidelity.main("),
    "make importance": ("tests/benchmarks/test_importance.py", "importance.main("),
    "make vllm-fidelity": ("tests/vllm/test_fidelity_table.py", "fidelity.main("),
    "make leaderboard": ("tests/benchmarks/test_leaderboard.py", "leaderboard.main("),
    ".ci/run": ("CONTRIBUTING.md", ".ci/run"),  # by whoever changes something, and it runs this
    ".venv/bin/kvcompress bench": ("tests/lab/test_tune_kernels.py", '["bench", "--tune"]'),
    ".venv/bin/kvcompress eval": ("tests/lab/test_cli.py", '"eval", "--model"'),
    ".venv/bin/kvcompress demo --serve-metrics": (
        "tests/lab/test_cli.py",
        '"--serve-metrics", port',
    ),
    ".venv/bin/kvcompress doctor": ("tests/test_doctor.py", 'main(["doctor"'),
    ".venv/bin/kvcompress top": ("tests/metrics/test_top.py", '"top", "--once"'),
    ".venv/bin/kvcompress scrub": ("tests/storage/test_commands.py", '"scrub", folder'),
    ".venv/bin/kvcompress inspect": ("tests/storage/test_commands.py", '"inspect", path'),
    ".venv/bin/kvcompress tune": ("tests/lab/test_tune.py", '"tune", "--model"'),
    ".venv/bin/kvcompress compare": ("tests/lab/test_compare.py", '"compare", "--model"'),
    ".venv/bin/kvcompress calibrate": ("tests/lab/test_calibrate.py", '"calibrate", "--model"'),
}


def test_every_command_of_the_readme_is_run():
    commands = readme_commands()
    assert commands
    for command in commands:
        known = [k for k in RUN_BY if command == k or command.startswith(k + " ")]
        assert known, f"README shows a command that nothing runs: {command}"
        runner, words = RUN_BY[known[0]]
        assert words in (ROOT / runner).read_text(), (command, runner)


def test_the_code_in_the_readme_runs():
    smollm2_file()
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    answer, ratio = python(block).rsplit("\n", 1)
    assert "Paris" in answer
    assert 0.9 < float(ratio) < 3


def test_the_makefile_has_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in (
        "demo",
        "test",
        "lint",
        "bench",
        "peers",
        "leaderboard",
        "fidelity",
        "importance",
        "vllm-fidelity",
        "vllm-speed",
        "gpu-gate",
    ):
        assert re.search(rf"^{target}:( |$)", makefile, flags=re.MULTILINE)
