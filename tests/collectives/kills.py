"""Kill a rank with SIGKILL at a random moment, again and again: nobody hangs, the others name it, nothing is left.

    python tests/collectives/kills.py --kills 200 --seed 1

Each group connects and then calls random collectives for as long as it lives. The moment of the kill is drawn from the
time that connecting takes, or from the calls that follow.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from ranks import SERVER

TIMEOUT = 3.0
"""Seconds that a rank waits for one that never connected; one that connected is missed at once."""

HANG = 60.0
"""Seconds after which a survivor is taken to hang, from the kill on."""


def live(rank: int, size: int, name: str, seed: int, pipe: Connection) -> None:
    """A rank: connect, then random collectives until a PeerError, which is sent to the parent."""
    import torch

    from detinfer.collectives import connect
    from detinfer.errors import PeerError

    torch.set_num_threads(1)
    pipe.send("started")
    pipe.recv()
    stage, calls = "connect", 0
    try:
        with connect(name=name, rank=rank, size=size, timeout=TIMEOUT, staging=4096) as ranks:
            stage = "call"
            drawn = random.Random(seed)  # the same on every rank
            while True:
                n = drawn.choice((1, 7, 300, 2999))
                x = torch.full((n * size,), float(rank))
                kind = drawn.randrange(5)
                if kind == 0:
                    total = ranks.all_reduce(x, path=drawn.choice(("1stage", "2stage")))
                    assert total.tolist() == [size * (size - 1) / 2] * (n * size)
                elif kind == 1:
                    ranks.reduce_scatter(x)
                elif kind == 2:
                    ranks.all_gather(x)
                elif kind == 3:
                    ranks.all_reduce_rms_norm(x, x, None, 1e-6)
                else:
                    ranks.barrier()
                calls += 1
    except PeerError as error:
        pipe.send((stage, calls, str(error)))
    except BaseException as error:
        pipe.send(("wrong", calls, repr(error)))


def left_behind(name: str) -> list[str]:
    """Files, sockets and shared memory of this group that are still there."""
    places = [Path("/dev/shm"), Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/run")]
    found = [str(path) for place in places if place.is_dir() for path in place.glob("*detinfer*") if name in path.name]
    found += [line for line in Path("/proc/net/unix").read_text().splitlines() if name in line]
    return found + [str(path) for path in Path("/dev/shm").glob("*detinfer*")]


def kill_once(seed: int) -> tuple[str, list[str]]:
    """(where the survivors were, what went wrong) of one group."""
    drawn = random.Random(seed)
    size = drawn.randint(2, 6)
    victim, name = drawn.randrange(size), f"kill-{os.getpid()}-{seed}"
    early = drawn.random() < 0.5
    delay = drawn.uniform(0, 0.015) if early else drawn.uniform(0.01, 0.15)
    processes, pipes = [], []
    for rank in range(size):
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=live, args=(rank, size, name, seed, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    problems, stages = [], set()
    try:
        for pipe in pipes:
            assert pipe.recv() == "started"
        for pipe in pipes:
            pipe.send("go")
        time.sleep(delay)
        processes[victim].kill()
        patience = HANG
        for rank, pipe in enumerate(pipes):
            if rank == victim:
                continue
            while not pipe.poll(0.2) and patience > 0:
                patience -= 0.2  # and not by the clock, which goes on while processes are stopped
            if not pipe.poll():
                problems.append(f"rank {rank} hangs")
                continue
            stage, _, text = pipe.recv()
            stages.add(stage)
            if stage == "wrong" or f"rank {victim} " not in text:
                problems.append(f"rank {rank}, {stage}: {text}")
        for process in processes:
            while process.is_alive() and patience > 0:
                process.join(0.2)
                patience -= 0.2
        problems += [f"process {process.pid} is left" for process in processes if process.is_alive()]
    except (EOFError, ConnectionError) as error:
        problems.append(f"a rank other than {victim} ended: {error!r}")
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
    problems += [f"left behind: {what}" for what in left_behind(name)]
    return "+".join(sorted(stages)), [f"seed {seed}, rank {victim} of {size}: {problem}" for problem in problems]


def kill_many(kills: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """(how many groups were where when a rank was killed, everything that went wrong)."""
    where: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    for i in range(kills):
        stage, wrong = kill_once(seed * 1000 + i)
        where[stage] += 1
        problems += wrong
    return dict(where), problems


def main() -> Any:
    """Print where the kills fell and what went wrong; the status says whether anything did."""
    parser = argparse.ArgumentParser(description="Kill ranks at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    start = time.monotonic()
    where, problems = kill_many(chosen.kills, chosen.seed)
    print(f"{chosen.kills} kills in {time.monotonic() - start:.0f} s; survivors were in: {where}")
    print("\n".join(problems) or "no hang, no file, no process, no rank unnamed")
    return len(problems) > 0


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    sys.exit(main())
