"""What holds for every test: no network, and one thread: threads that wait for each other make tiny models slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
