"""Starts several ranks on this machine by DeepSpeed's launcher, for `rung pretrain --ranks N`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import psutil
import torch

from rung.pretrain.config import PretrainConfig
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.network import free_port
from rung.pretrain.plan import make_plan


def launch(num_ranks: int, config: PretrainConfig, words: Sequence[str]) -> int:
    """Run `python -m rung.pretrain WORDS` on `num_ranks` ranks and return the exit status.

    SIGINT and SIGTERM are passed on to the ranks, which save their state. Raises ValueError for what the ranks would
    refuse, so that it is said once.
    """
    if num_ranks < 1:
        raise ValueError(f"--ranks: expected at least 1, found {num_ranks}")
    if "RANK" in os.environ:
        raise ValueError("--ranks: another launcher started this process already (RANK is set); leave --ranks out")
    make_plan(config, num_ranks)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(num_ranks))}).encode()).decode()
    # The module behind the `deepspeed` command: that command ends on SIGTERM without telling the ranks.
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank"]
    launcher += [f"--world_info={world}", f"--master_port={free_port()}"]
    environment = dict(os.environ) if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ}
    # In a session of its own: a Ctrl-C at the terminal would otherwise reach the launcher too, which then ends first.
    with subprocess.Popen(
        [*launcher, "--module", "rung.pretrain", *words], env=environment, start_new_session=True
    ) as process:
        return _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the launcher, whose exit status is that of the first rank that fails; pass signals on to its ranks."""
    with Interrupt() as interrupt:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if interrupt.requested:
                    interrupt.requested = False
                    with contextlib.suppress(psutil.NoSuchProcess):  # the launcher just ended
                        for rank in psutil.Process(process.pid).children():
                            rank.terminate()
