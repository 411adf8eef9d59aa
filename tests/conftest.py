import os

# the suite never asks a hub, and its numbers do not depend on how many cores there are
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
