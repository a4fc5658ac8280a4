from __future__ import annotations

import peft
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from .config import PEFT_TYPE, BottleneckConfig
from .model import BottleneckModel


def register(
    name: str = PEFT_TYPE, config: type[PeftConfig] = BottleneckConfig, model: type[BaseTuner] = BottleneckModel
) -> None:
    """Makes a method known to `peft.get_peft_model`, `PeftModel.from_pretrained` and `PeftConfig.from_pretrained`.

    peft's own `register_peft_method` refuses every name that is not in its closed enumeration `PeftType`, so this
    writes into the three dictionaries which that function fills. They are no documented extension point: all that
    relies on them is here, and the tests of this room show whether a new peft still works.

    Args:
        name: what the config has as its `peft_type`.
        config: its settings.
        model: its tuner.

    Raises:
        ImportError: if this peft has no such dictionaries, or is older than 0.21.
        ValueError: if the name is taken by something else.
    """
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        # Before 0.21 saving went by `PeftType` as well: training would run, and its result could not be saved.
        raise ImportError(
            f"robust_peft expected peft 0.21 or newer. Found {peft.__version__}, which cannot save an adapter that is "
            "not its own. Install a newer peft."
        )
    entries = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": config,
        "PEFT_TYPE_TO_TUNER_MAPPING": model,
        "PEFT_TYPE_TO_PREFIX_MAPPING": model.prefix,
    }
    for attribute, entry in entries.items():
        known = getattr(mapping, attribute, None)
        if not isinstance(known, dict):
            raise ImportError(
                f"robust_peft expected the dictionary peft.mapping.{attribute}. Found none in peft {peft.__version__}. "
                "Install peft 0.21.2, with which this was checked."
            )
        if known.setdefault(name, entry) is not entry:
            raise ValueError(
                f"Expected the peft method {name} to be free. Found {known[name]!r}. Import robust_peft only "
                "once in a process, without reloading it."
            )
