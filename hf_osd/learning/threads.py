"""How many CPU threads the training thread computes with. Not covered: what other libraries of the process start."""

import os
import threading

import torch


def leave_cores_to_serving() -> None:
    """
    Let the calling thread compute with the cores that the process's other threads do not use, at least one.

    OpenMP gives each thread that computes a team of its own. As soon as all teams together have more threads than
    there are cores, those of every team go to sleep between operations instead of waiting for the next, and waking
    them makes small operations twice as slow: serving would stay slow even while nothing is being learned.
    """
    serving = torch.get_num_threads()
    own = max(1, min(serving, _cores() - serving + 1))
    if own < serving:
        torch.set_num_threads(own)
        # That also set the number for threads to come, which a thread of no other use sets back.
        restore = threading.Thread(target=torch.set_num_threads, args=(serving,), name="hf_osd-threads")
        restore.start()
        restore.join()


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1
