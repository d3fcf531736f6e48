"""What every killed run needs, loaded once: a server imports this, and its children find it there."""

import threading

import pytest  # noqa: F401  (whose command is what the children call their main module)
import torch
from tqdm import tqdm

from diffgraft.bases import load_base
from diffgraft.cli import main  # noqa: F401
from diffgraft.trainers.run import train  # noqa: F401

tqdm.set_lock(threading.RLock())  # its own is shared between processes, and stays where one is killed
torch.set_num_threads(1)
BASE = load_base("tiny")
BASE.pipeline()
