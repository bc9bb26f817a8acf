#!/usr/bin/env python
"""The best 10 of all items for many users, in users/s, beside what a user would pick instead, on the same factors.

    python scripts/bench_topn.py                               # random factors
    python scripts/bench_topn.py --run runs/advanced --json topn.json    # some rows of a run's as well

Rounds go through all systems in turn, and the table shows the median of each. Every system gets the same float32
factors with the item bias as one more column; ours and faiss's lists are compared with brute force in float64 on
``--checked`` users (ours is exact to the last bit of its own definition, which tests/test_top_n.py holds it to; here a
list counts as equal where the scores at each place agree within float32's rounding). Peers live in an environment of
their own under ``.peers``; one that cannot be installed is named as absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers import PeerAbsent, environment

from mfdist.results.exported_model import ExportedModel
from mfdist.results.item_index import ItemIndex

PEERS = ("faiss-cpu", "implicit", "scipy", "numpy")
PEER = """
import os, sys, time
threads = sys.argv[4]
os.environ.update(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
import numpy as np
data, k, system = np.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
users, items = data["users"], data["items"]
if system == "faiss IndexFlatIP":
    import faiss
    faiss.omp_set_num_threads(int(threads))
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    search = lambda part: index.search(part, k)[::-1]
else:
    from implicit.cpu.topk import topk
    search = lambda part: topk(items, part, k, num_threads=int(threads))
search(users[:64])
began = time.perf_counter()
rows, scores = search(users)
print(len(users) / (time.perf_counter() - began))
np.save(sys.argv[1] + ".rows.npy", np.asarray(rows))
"""
Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run whose trained factors are measured as well")
    parser.add_argument("--items", type=int, default=100_000, help="items (default %(default)s)")
    parser.add_argument("--users", type=int, default=10_000, help="users (default %(default)s)")
    parser.add_argument("--dim", type=int, default=32, help="random factors beside the bias (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="items for each user (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every system")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured (default %(default)s)")
    parser.add_argument("--checked", type=int, default=1000, help="users compared with brute force")
    parser.add_argument("--json", help="write the figures here")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    rows = []
    for name, factors in sets_of(flags):
        rows += measure(name, *factors, flags)
    print(f"{'factors':10}{'system':22}{'users/s':>12}{'of faiss':>10}  equal to brute force")
    for row in rows:
        faiss = next((r["users_per_second"] for r in rows
                      if r["factors"] == row["factors"] and r["system"].startswith("faiss")), None)  # fmt: skip
        rate = row.get("users_per_second")
        shown = f"{rate:12,.0f}{rate / faiss if faiss else float('nan'):10.2f}" if rate else f"{'absent':>12}{'':10}"
        print(f"{row['factors']:10}{row['system']:22}{shown}  {row.get('equal', row.get('absent', ''))}")
    if flags.json:
        machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def sets_of(flags: argparse.Namespace) -> list[tuple[str, tuple[Array, Array, Array]]]:
    """Name, and users (users, dim), items (items, dim), item bias (items,)."""
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((n, flags.dim), np.float32) for n in (flags.users, flags.items))
    found = [("random", (users, items, rng.standard_normal(flags.items, np.float32)))]
    if flags.run:
        model = ExportedModel.open(flags.run)
        chosen = np.sort(rng.choice(model.num_items, min(flags.items, model.num_items), replace=False))
        some = rng.choice(model.num_users, min(flags.users, model.num_users), replace=False)
        bias = np.zeros(model.num_items, np.float32) if model.item_bias is None else model.item_bias
        found.append(("trained", (model.user_embedding[some], model.item_embedding[chosen], bias[chosen])))
    return found


def measure(name: str, users: Array, items: Array, bias: Array, flags: argparse.Namespace) -> list[dict[str, Any]]:
    k, checked = flags.top_k, min(flags.checked, len(users))
    score = users[:checked].astype(np.float64) @ items.T.astype(np.float64) + bias
    best = -np.sort(-score, axis=1)[:, :k]
    index = ItemIndex(items, bias, user_norms=np.linalg.norm(users, axis=1), threads=flags.threads)
    wide = np.concatenate([users, np.ones((len(users), 1), np.float32)], 1), np.concatenate([items, bias[:, None]], 1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/factors.npz"
        np.savez(path, users=wide[0], items=wide[1])
        systems: dict[str, Callable[[], tuple[float, Array]]] = {
            "mfdist": lambda: timed(len(users), lambda: index.search(users, k)[0]),
            "faiss IndexFlatIP": lambda: peer(path, k, "faiss IndexFlatIP", flags.threads),
            "implicit topk": lambda: peer(path, k, "implicit topk", flags.threads),
            "torch mm + topk": lambda: timed(len(users), lambda: by_torch(*wide, k)),
            "numpy": lambda: timed(len(users) // 10, lambda: by_numpy(wide[0][: len(users) // 10], wide[1], k)),
        }
        index.search(users[:64], k)  # compiles
        rates: dict[str, list[float]] = {system: [] for system in systems}
        equal, absent = {}, {}
        for number in range(flags.rounds):
            for system in list(systems) if number % 2 == 0 else list(systems)[::-1]:
                try:
                    rate, rows = systems[system]()
                except (PeerAbsent, subprocess.CalledProcessError) as error:
                    absent[system] = str(error)
                    continue
                rates[system].append(rate)
                some = min(checked, len(rows))
                found = np.take_along_axis(score[:some], rows[:some].astype(np.int64), 1)
                size = np.abs(best[:some]).max()
                equal[system] = f"{np.isclose(found, best[:some], atol=1e-5 * size).all(axis=1).mean():.1%}"
    return [
        {"factors": name, "system": system, "algorithm": "top-n", "exact": True, "device": "cpu",
         "threads": flags.threads, "items": len(items), "dim": items.shape[1], "top_k": k,
         "peak_rss_bytes": psutil.Process().memory_info().rss,
         **({"users_per_second": statistics.median(rates[system]), "rows_per_second": statistics.median(rates[system]),
             "equal": equal[system]} if rates[system] else {"absent": absent[system]})}
        for system in systems
    ]  # fmt: skip


def timed(users: int, search: Callable[[], Array]) -> tuple[float, Array]:
    began = time.perf_counter()
    rows = search()
    return users / (time.perf_counter() - began), rows


def peer(path: str, k: int, system: str, threads: int) -> tuple[float, Array]:
    python = environment("topn", PEERS)
    arguments = [str(python), "-c", PEER, path, str(k), system, str(threads)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return float(done.stdout), np.load(path + ".rows.npy")


def by_torch(users: Array, items: Array, k: int) -> Array:
    left, right = torch.from_numpy(users), torch.from_numpy(items).T
    return torch.cat([(left[f : f + 256] @ right).topk(k).indices for f in range(0, len(left), 256)]).numpy()


def by_numpy(users: Array, items: Array, k: int) -> Array:
    found = []
    for first in range(0, len(users), 256):
        score = users[first : first + 256] @ items.T
        part = np.argpartition(-score, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(score, part, 1), axis=1)
        found.append(np.take_along_axis(part, order, 1))
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
