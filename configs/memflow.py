"""KVPO on MemFlow: LongLive's model with a memory bank. The paper's setting, and the release's.

    python -m kvpo_jax.main --config=configs/memflow.py --config.weights=memflow.safetensors ...
    python -m kvpo_jax.main --config=configs/memflow.py:release ...

Files as for configs/longlive.py. Expected outcome: this project has measured none. Only what
differs from configs/longlive.py stands here; every field is explained in configs/tiny.py.
"""

from ml_collections import ConfigDict

from kvpo_jax.runtime.config import derive

PRESETS = ("paper", "release")


def get_config(preset: str = "paper") -> ConfigDict:
    """The MemFlow configuration; `preset` is "paper" or "release"."""
    c = derive("configs/longlive.py", preset)
    c.backbone = "memflow"
    c.window.bank = 3  # frames of the bank, attended to besides the window
    c.window.bank_interval = 3  # every third block leaves its first frame
    c.model.sparse_memory = 0  # 3 turns MemFlow's sparse memory activation on; released off
    if preset == "release":
        # m = 3 nearest frames are the current block alone, and routing replaces the sink too: 9 of
        # 9 slots. What is drawn is what the history holds at the fork, the sink included.
        c.window.update(near=0, excluded=3, keep_sink=False, shared_ring=False)
        c.window.bank_reinsert = True  # the newest frame enters the bank before every block
    return c
