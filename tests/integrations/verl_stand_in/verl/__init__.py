"""The names that our integration looks up, as verl 0.9 has them; verl itself needs ray, tensordict
and hydra. `test_verl_stand_in.py` puts this on the path."""

import importlib
import os

for name in filter(None, os.getenv("VERL_USE_EXTERNAL_MODULES", "").split(",")):
    importlib.import_module(name)
