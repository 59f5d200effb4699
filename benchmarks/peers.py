"""How fast are we beside other projects' own code, on a CPU?

    make peers                              # makes docs/peers.md: 8 and 4 bits, how the cost grows
    make peers PEERS_ARGS="--bits 4"
    python benchmarks/peers.py --quick      # three rounds, nothing written

Compress, decompress and decode attention for Llama-3-8B-like shapes (8 KV heads, 32 query heads,
head dim 128), ours (jitted) and each peer's, in the same run on the same threads. Every result is
checked before it is timed; who cannot run or is wrong is listed with the reason. Peers are no
dependencies of ours: `make peers` installs them (the extra `peers`, Python 3.11) into an
environment of its own.
"""

import argparse
import os
import shlex
import sys


def main() -> None:
    """Checks, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--layers", type=int, default=1, help="at once; default 1")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9, help="rounds; default 9")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="three rounds, no scaling")
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
            layers=args.layers,
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
