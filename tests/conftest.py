"""For every test: nothing is asked of a network."""

import os

# Before any library of the Hub is imported, which read them then.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
