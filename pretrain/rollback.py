"""Which data a run leaves out after its loss jumped: kept in its folder, so that every later start leaves it out, too.

All data between the checkpoint and the spike is left out, as Chowdhery et al., PaLM (2022), section 5.1, did by hand:
spikes came of some weights meeting some batches, and the weights lead up to it again if the batches before it return.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_pipelines.errors import DataError
from data_pipelines.order.mixture import LeftOut
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.text import to_json
from pretrain.errors import CheckpointError
from pretrain.parallel.mesh import Axis

_SPANS = TypeAdapter(tuple[LeftOut, ...])


class Rollbacks:
    """What is left out, as rollbacks.json in the run's folder. All ranks call each method together.

    A checkpoint knows what was left out before it was saved. One from before a rollback does not, and is the one from
    which a run that is killed soon afterwards goes on.
    """

    def __init__(self, folder: Path, world: Axis) -> None:
        self.path = folder / "rollbacks.json"
        self.world = world

    def load(self) -> tuple[LeftOut, ...]:
        """What was kept, oldest first.

        Raises:
            CheckpointError: the file is not what `keep` wrote.
        """
        content, problem = self.world.from_first(self._read() if self.world.rank == 0 else None)
        if problem:
            raise CheckpointError(problem)
        return _SPANS.validate_python(content)

    def keep(self, spans: Sequence[LeftOut]) -> None:
        """Keeps all of them, in place of what was there.

        Raises:
            DataError: the file cannot be written.
        """
        problem = None
        if self.world.rank == 0:
            text = to_json([span.model_dump() for span in spans])
            try:
                write_atomically(self.path, lambda tmp: tmp.write_text(text, encoding="utf-8"))
            except DataError as error:
                problem = error
        if problem := self.world.from_first(problem):
            raise problem

    def _read(self) -> tuple[list[object], str | None]:
        if not self.path.exists():
            return [], None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            _SPANS.validate_python(content)
        except (OSError, ValueError, ValidationError) as error:
            return [], (
                f"{self.path}, which says what data the run leaves out, cannot be read ({type(error).__name__}): "
                f"restore it from a copy, or remove it to read that data again."
            )
        return content, None
