"""How fast are we beside other projects' own code, on a CPU?

    python benchmarks/peers.py                      # 8 and 4 bits, then how the cost grows
    python benchmarks/peers.py --quick              # one layer, three rounds
    python benchmarks/peers.py --json peers.json --markdown peers.md

Compress, decompress and decode-attention for Llama-3-8B-like shapes (8 KV heads, 32 query heads,
head dim 128), ours (jitted) and each peer's, in the same run on the same threads. Every result is
checked before it is timed; who cannot run or is wrong is listed with the reason. Peers are not
dependencies of ours; into an environment of its own (Python 3.11) go

    pip install torch==2.13.0 transformers==5.24.0 hqq==0.2.8.post1 optimum-quanto==0.2.7 \\
        turboquant==0.2.0 tqai==0.6.1 turboquantcpu==0.1.0 tiny-turboquant==0.18.0 kvq==0.1.0 \\
        numpy==2.3.5
    pip install -e '.[lab]'

numpy is older than the newest because turboquant calls `numpy.trapz`. See benchmarks/README.md.
"""

import argparse
import os
import shlex
import sys


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--layers", type=int, default=4, help="of the model; default 4")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9, help="rounds; default 9")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="one layer, three rounds, no scaling")
    parser.add_argument("--no-scaling", action="store_true", help="leave out how the cost grows")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    threads = args.threads or len(cores)
    if not 1 <= threads <= len(cores):
        parser.error(f"--threads: expected 1 to {len(cores)}, got {threads}")
    # Before jax and torch are loaded: both make their thread pools after the cores they may use.
    os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from peers.run import Options, run

    run(
        Options(
            bits=tuple(args.bits),
            layers=1 if args.quick else args.layers,
            tokens=args.tokens,
            repeats=3 if args.quick else args.repeats,
            threads=threads,
            scaling=not (args.quick or args.no_scaling),
            json=args.json,
            markdown=args.markdown,
            command=shlex.join(["python", *sys.argv]),
        )
    )


if __name__ == "__main__":
    main()
