"""Two gloo processes that run every case in one go: what `test_sharding.py` reports case by case."""

import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
PATIENCE = timedelta(seconds=60)  # a collective that waits longer is a hang; a rank may be compiling meanwhile
STILL = 180.0  # seconds in which no rank comes to the end of a case; one needs less than 2

Case = Callable[[Path], None]


def run_rank(rank: int, port: int, folder: str, cases: Mapping[str, Case]) -> None:
    """Run the cases on one rank; what each raised goes to a file of its own."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, rank == 0, timeout=PATIENCE)
    for group, (name, case) in enumerate(cases.items()):
        error = run_case(case, name, rank, dist.PrefixStore(str(group), store), Path(folder))
        Path(folder, f"{rank} {name}").write_text(json.dumps(error))
    store.set(f"end {rank}", "")
    store.wait([f"end {r}" for r in range(RANKS)])  # rank 0 keeps the store for the others


def run_case(case: Case, name: str, rank: int, store: dist.Store, folder: Path) -> str:
    """One case in a process group of its own: when a rank raises, the others' collectives end with it."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    try:
        case(folder / "files" / name)
        return ""
    except BaseException:  # CheckpointException is no Exception
        return traceback.format_exc()
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_world(cases: Mapping[str, Case], folder: Path) -> dict[str, list[str]]:
    """Run all cases on all ranks -> what each rank has to say of each case; "" is good."""
    os.makedirs(folder / "files")
    ranks = mp.spawn(run_rank, (free_port(), str(folder), cases), nprocs=RANKS, join=False)
    done, since = 0, time.monotonic()
    try:
        while not ranks.join(timeout=1.0) and time.monotonic() - since < STILL:
            if (now := len(os.listdir(folder))) > done:
                done, since = now, time.monotonic()
    except mp.ProcessRaisedException as e:
        print(e)  # the cases that this rank did not reach fail below
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()

    def said(rank: int, name: str) -> str:
        file = folder / f"{rank} {name}"
        return json.loads(file.read_text()) if file.exists() else "this rank never came to the end of this case"

    return {name: [said(rank, name) for rank in range(RANKS)] for name in cases}
