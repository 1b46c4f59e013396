"""A cache of the last few loaded checkpoints."""

from collections import OrderedDict
from pathlib import Path

from llm_basics.analysis import inspection, run_summary
from llm_basics.core import device as devices
from llm_basics.inference import engine
from llm_basics.lab import catalog

# two side by side, and a neighbor on the slider
MAX_MODELS = 3


class Models:
    """The models of runs; used only by the worker thread."""

    def __init__(self, runs: catalog.Catalog, device: str = "cpu") -> None:
        self.runs = runs
        self._device = device
        self._loaded: OrderedDict[tuple[Path, int], inspection.LoadedModel] = OrderedDict()

    def load(self, id: str, which: str = "latest") -> inspection.LoadedModel:
        """The model of a run at a checkpoint, verified when it is read."""
        path = self.runs.checkpoint(id, which)
        key = path, path.stat().st_mtime_ns
        if key not in self._loaded:
            step = str(run_summary.step_of(path))
            lm, chosen = engine.load_run(self.runs.folder(id), devices.choose(self._device), step)
            self._loaded[key] = inspection.LoadedModel(lm.eval().requires_grad_(False), chosen)
        self._loaded.move_to_end(key)
        while len(self._loaded) > MAX_MODELS:
            self._loaded.popitem(last=False)
        return self._loaded[key]
